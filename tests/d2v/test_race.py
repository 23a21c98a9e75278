"""d2v race: what its numbers mean, that contestants do not disturb each other, its files, its refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v.cli.main import main
from d2v.config.model import Objective
from d2v.config.objectives import for_objective
from d2v.config.run import Config, ProbeConfig
from d2v.data import loader
from d2v.data.open import open_labelled
from d2v.data.types import DataError
from d2v.evaluate.online_probe import evenly
from d2v.tools.contestant import Contestant
from d2v.tools.flops import step_work, supervised_work
from d2v.tools.race import COUNTED, WIDER, beyond, recount, run_race, validation
from d2v.tools.race_report import best_of, race_lines, race_rows, ratios, time_to
from d2v.tools.supervised import SupervisedTrainer
from d2v.train import process
from tests.d2v.test_online_probe import stripes
from tests.d2v.tiny_runs import run, tiny

ONCE: dict[str, Any] = {"seeds": 1, "lr_scales": (1.0,), "evaluations": 1}


def raced(**changed: Any) -> Config:
    cfg = tiny("image", steps=6, data={"batch": 4}, **changed)
    return dataclasses.replace(cfg, probe=ProbeConfig(rows=40))


def test_time_to_an_accuracy_lies_between_probes() -> None:
    curve = [(0.0, 0.2), (10.0, 0.4), (20.0, 0.3), (30.0, 0.6)]
    assert time_to(curve, 0.3) == pytest.approx(5)
    assert time_to(curve, 0.4) == 10.0
    assert time_to(curve, 0.5) == pytest.approx(20 + 10 * 2 / 3)
    assert time_to(curve, 0.1) == 0.0
    assert time_to(curve, 0.7) is None
    assert best_of([(0.0, 0.2), (1.0, 0.5), (2.0, 0.5)]) == (1.0, 0.5)


def made_race() -> dict[str, Any]:
    def track(entry: str, seed: int, *points: tuple[float, float]) -> dict[str, Any]:
        made = [
            {"step": i, "seconds": t, "samples": 10.0 * i, "scores": {"linear/a": y, "linear/b": y}}
            for i, (t, y) in enumerate(points)
        ]
        return {
            "entry": entry, "seed": seed, "lr": 1e-3, "flops_per_step": 10**9,
            "peak_bytes": 2**20, "points": made,
        }  # fmt: skip

    tracks = [
        track("data2vec2", 1, (0, 0.1), (10, 0.5), (20, 0.6)),
        track("mae", 1, (0, 0.1), (10, 0.2), (20, 0.3)),
        track("supervised", 1, (0, 0.1), (10, 0.8), (20, 0.9)),
        track("data2vec2", 2, (0, 0.3), (10, 0.5), (20, 0.6)),
        track("mae", 2, (0, 0.3), (10, 0.3), (20, 0.3)),
        track("supervised", 2, (0, 0.1), (10, 0.8), (20, 0.9)),
        track("data2vec2", 3, (0, 0.1), (10, 0.2), (20, 0.25)),
        track("mae", 3, (0, 0.1), (10, 0.3), (20, 0.3)),
        track("supervised", 3, (0, 0.1), (10, 0.8), (20, 0.7)),
    ]
    return {
        "preset": "p", "data": "d", "parts": ["a", "b"], "minutes": 1, "tracks": tracks,
        "raw": {"linear/a": 0.2, "linear/b": 0.25}, "majority": {"a": 0.1, "b": 0.1},
    }  # fmt: skip


def test_ratios_are_of_the_rivals_best() -> None:
    race = made_race()
    first, second, third = ratios(race, "mae", "b")
    assert first == pytest.approx(20 / 5)  # 0.3 is reached half way to 0.5
    assert second == math.inf  # nothing was gained over the untrained encoder
    assert third is None
    rows = race_rows(race)
    table = {row[0]: row for row in rows}
    assert table["mae"][1:4] == ["30.0 ± 0.0", "30.0 ± 0.0", "4.0, at once, never"]
    assert table["data2vec2"][1] == "48.3 ± 20.2" and table["data2vec2"][3] == ""
    assert table["supervised"][2] == "86.7 ± 5.8" and table["supervised"][3] == ""
    assert table["untrained encoder"][1] == "16.7 ± 11.5"
    assert table["raw input"][1] == "25.0"
    assert table["mae"][4:7] == ["20", "2", "1.0"]
    assert all(len(row) == len(rows[0]) for row in rows)
    assert len(race_lines(race)) == 1 + len(rows)


def test_a_search_goes_on_past_its_best_end() -> None:
    assert beyond({0.5: 0.1, 1.0: 0.2, 4.0: 0.3}) == 16.0
    assert beyond({0.5: 0.3, 1.0: 0.2, 4.0: 0.3}) == 0.25  # of equals the smaller
    assert beyond({0.5: 0.1, 1.0: 0.3, 4.0: 0.2}) is None


def test_a_race_of_all_objectives_writes_everything(tmp_path: Path) -> None:
    data, out = stripes(tmp_path), tmp_path / "race"
    found = run_race(
        raced(), data, out, objectives=("data2vec2", "data2vec1", "mae"), minutes=0.01, seeds=2,
        lr_scales=(0.5, 1.0), search_minutes=0.005, evaluations=2,
    )  # fmt: skip
    assert found == json.loads((out / "race.json").read_text())
    assert (out / "race.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    entries = ["data2vec2", "data2vec1", "mae", "supervised"]
    objectives: tuple[Objective, ...] = ("data2vec2", "data2vec1", "mae")
    model = raced().model
    expected: dict[str, int] = {
        name: step_work(
            for_objective(raced(), name).model, (4 if name == "data2vec2" else 32, 1, 24, 24)
        ).total
        for name in objectives
    }
    expected["supervised"] = supervised_work(model, (32, 1, 24, 24), found["classes"], per_token=False).total
    assert found["flops"] == COUNTED
    assert [track["entry"] for track in found["tracks"]] == entries * 2
    assert [track["seed"] for track in found["tracks"]] == [1] * 4 + [2] * 4
    for track in found["tracks"]:
        points = track["points"]
        assert points[0]["step"] == points[0]["seconds"] == points[0]["samples"] == 0
        views = 4 if track["entry"] == "data2vec2" else 32
        assert points[-1]["samples"] == points[-1]["step"] * views
        assert points[1]["seconds"] >= 0.3 and points[2]["seconds"] >= 0.6
        assert track["flops_per_step"] == expected[track["entry"]] and track["peak_bytes"] > 1e5
        assert set(points[0]["scores"]) == {"linear/test", "knn/test", "rank"}
    lr = raced().optim.lr
    for entry in entries:
        chosen = found["search"]["chosen"][entry]
        scores = {float(scale): score for scale, score in found["search"]["scores"][entry].items()}
        assert {0.5, 1.0} <= scores.keys() and scores[chosen] == max(scores.values())
        ends = min(scores), max(scores)
        assert chosen not in ends or len(scores) == 2 + WIDER
        assert {track["lr"] for track in found["tracks"] if track["entry"] == entry} == {lr * chosen}
    assert 0 < found["raw"]["linear/test"] <= 1
    found["tracks"] = [{**track, "flops_per_step": 1} for track in found["tracks"][:4]]
    again = recount(found, raced(), objectives, tmp_path / "recounted")
    assert {t["entry"]: t["flops_per_step"] for t in again["tracks"]} == expected
    found["tracks"][0]["points"][-1]["samples"] += 1
    with pytest.raises(ValueError, match="data2vec2 of seed 1 must have used .* samples by step"):
        recount(found, raced(), objectives, tmp_path / "others")
    with pytest.raises(ValueError, match="exists already"):
        run_race(raced(), data, out, objectives=("mae",), minutes=1, **ONCE)


def test_a_contestant_trains_as_a_run_does_whoever_else_races(tmp_path: Path) -> None:
    data = stripes(tmp_path)
    random = {"encoder_dropout": 0.1, "layerdrop": 0.3}
    cfg = raced(model=random)
    labelled = open_labelled(data, cfg)
    ticks = itertools.count()  # every look at the clock is a second later, so a step takes one

    def clock() -> float:
        return float(next(ticks))

    first = Contestant("data2vec2", cfg, data, labelled, tmp_path, 6.0, clock)
    other = Contestant("mae", for_objective(cfg, "mae"), data, labelled, tmp_path, 3.0, clock)
    for seconds in range(1, 7):
        first.advance(seconds)
        other.advance(seconds)
        first.scores(labelled)
    assert first.steps == other.steps == 6
    for parameter in other.learner.model.parameters():
        parameter.data.fill_(float("nan"))
    diverged = other.scores(labelled)
    assert diverged.keys() == first.scores(labelled).keys() and set(diverged.values()) == {0.0}
    process.seed_all(99)
    run(cfg, data, tmp_path / "run")
    import d2v

    trained = d2v.load(tmp_path / "run")
    mine = first.learner.model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("entry", ["supervised", "data2vec2"])
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_contestant_reads_all_steps_with_one_loader_and_is_probed_on_its_backends(
    modality: str,
    entry: Any,
    chosen: Callable[[Callable[[], object]], set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    torchs = loader.DataLoader

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(torchs(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(loader, "DataLoader", counted)
    cfg = tiny(modality, train={"backend": "eager,residual_norm=triton"})
    data = stripes(tmp_path) if modality == "image" else "speech"
    labelled = open_labelled(data, cfg)
    made.clear()
    contestant = Contestant(entry, cfg, data, labelled, tmp_path)
    for number in range(1, 4):
        assert contestant.learner.train_step(number).samples > 0
    assert len(made) == 1
    few = {name: evenly(part, 4) for name, part in labelled.splits.items()}
    assert chosen(lambda: contestant.scores(dataclasses.replace(labelled, splits=few))) == {"triton"}


def test_workers_change_nothing_for_the_supervised_encoder(tmp_path: Path) -> None:
    """Its samples are drawn by step: workers read ahead, whatever else is drawn meanwhile."""
    data, seen = stripes(tmp_path), []
    for workers in (0, 2):
        cfg = tiny("image", data={"workers": workers})
        learner = SupervisedTrainer(cfg, open_labelled(data, cfg), torch.device("cpu"))
        batches = []
        for _ in range(3):
            torch.rand(workers)
            batches.append(next(learner.stream))
        seen.append(batches)
    first, second, _ = seen[0]
    assert not torch.equal(first[0], second[0])
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[2], theirs[2])


def test_the_supervised_encoder_learns_labels(tmp_path: Path) -> None:
    data = stripes(tmp_path)
    cfg = raced(optim={"lr": 2e-3, "warmup": 5}, train={"steps": 60})
    labelled = open_labelled(data, cfg)
    ticks = itertools.count()
    contestant = Contestant("supervised", cfg, data, labelled, tmp_path, 60.0, lambda: float(next(ticks)))
    before = contestant.scores(labelled)["linear/test"]
    begun = Contestant("data2vec2", cfg, data, labelled, tmp_path).learner.model.state_dict()
    mine = contestant.learner.model.state_dict()
    assert not [name for name in mine if ".decoder." in name or "_ema" in name]
    assert all(torch.equal(value, begun[name]) for name, value in mine.items())
    contestant.advance(60)
    assert contestant.scores(labelled)["linear/test"] >= max(0.9, before)


def test_learning_rates_are_judged_on_a_fifth_of_every_class(tmp_path: Path) -> None:
    """Of pictures class by class, whatever their order; of labels of tokens on whole samples."""
    data = stripes(tmp_path)
    labelled = open_labelled(data, tiny("image"))
    train = labelled.splits["train"]
    held = validation(labelled).splits
    counts = {name: np.bincount(part.labels) for name, part in [("all", train), *held.items()]}
    assert np.array_equal(counts["test"], counts["all"] // 5)
    assert np.array_equal(counts["train"] + counts["test"], counts["all"])
    singles = train.select(np.unique(train.labels, return_index=True)[1])
    with pytest.raises(DataError, match="no class has two training samples"):
        validation(dataclasses.replace(labelled, splits={"train": singles}))
    spoken = open_labelled("speech", tiny("audio"))
    parts = validation(spoken).splits
    assert len(parts["test"]) == len(spoken.splits["train"]) // 5
    assert len(parts["train"]) + len(parts["test"]) == len(spoken.splits["train"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"minutes": 0}, "must be positive"),
        ({"lr_scales": ()}, "must be positive"),
        ({"objectives": ("mae", "mae")}, "objectives must be different"),
        ({"objectives": ("mlm",)}, "model.objective must be another"),
    ],
)
def test_races_that_cannot_be(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        given = {"objectives": ("mae",), "minutes": 1, **ONCE, **changed}
        run_race(raced(), stripes(tmp_path), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["race"]) == 2
    assert "the preset is missing" in capsys.readouterr().err
    assert main(["race", "image_tiny", "--data", "digits"]) == 2
    assert "--out DIR is missing" in capsys.readouterr().err
    data = stripes(tmp_path)
    arguments = ["--data", data, "--out", str(tmp_path / "race"), "--minutes", "0.005", "--seeds", "1"]
    more = ["--lr-scales", "1", "--evaluations", "1", "--data.batch", "4", "--objectives", "data2vec2", "mae"]
    assert main(["race", "image_tiny", *arguments, *more, "--no-supervised", "--probe.rows", "20"]) == 0
    said = capsys.readouterr().out
    assert "most frequent class" in said and "supervised" not in said
    rows = np.load(data)["labels"]
    assert len(rows) == 60


@pytest.mark.parametrize(("modality", "data"), [("audio", "speech"), ("text", "text")])
def test_labels_of_tokens_and_of_texts_are_learned_too(modality: str, data: str, tmp_path: Path) -> None:
    cfg = dataclasses.replace(tiny(modality, steps=2), probe=ProbeConfig(rows=20))
    found = run_race(
        cfg, data, tmp_path / "race", objectives=("data2vec2",), minutes=0.002, seeds=1, lr_scales=(1.0,),
        evaluations=1,
    )  # fmt: skip
    assert [track["entry"] for track in found["tracks"]] == ["data2vec2", "supervised"]
    assert found["parts"][-1] == {"audio": "unseen_voice", "text": "test"}[modality]
