"""The demo, scaled down: everything it promises to write, twice the same, and never over other files."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from d2v import load
from d2v.config.presets import preset
from d2v.data.types import Labelled, Split
from d2v.tools import demo
from d2v.tools.demo import MARKER, TASKS, TEXT_NOTE, remarks, run_demo, scaled, table
from d2v.train.loop import RunError
from d2v.train.pretrain_step import Trainer

from .tiny_runs import make_data, tiny

CONFIGS = {name: tiny(name, steps=2) for name in TASKS}


class Random(Split):
    """Random sources of the modality, labelled at random; the same ones for a seed."""

    def __init__(self, cfg, level, seed):
        generator = torch.Generator().manual_seed(seed)
        front = cfg.model.front
        if cfg.model.modality == "image":
            sources = torch.rand(24, front.channels, front.height, front.width, generator=generator)
        elif cfg.model.modality == "audio":
            sources = torch.randn(24, 4_000, generator=generator)
        else:
            sources = torch.randint(4, 300, (24, 9), generator=generator)
        shape = (24, front.frames(4_000)) if level == "token" else (24,)
        self.sources, self.labels = sources, torch.randint(0, 3, shape, generator=generator)

    def __len__(self):
        return len(self.sources)

    def batches(self, size):
        for i in range(0, len(self), size):
            yield self.sources[i : i + size], None, self.labels[i : i + size]

    def select(self, keep):
        chosen = copy.copy(self)
        chosen.sources, chosen.labels = self.sources[keep], self.labels[keep]
        return chosen

    def raw(self):
        labels = self.labels.flatten().numpy()
        return np.random.default_rng(0).standard_normal((len(labels), 5)).astype(np.float32), labels


def labelled_at_random(path, cfg, *, run_dir):
    """What `open_labelled` gives, without the seconds it takes to make the embedded sets."""
    assert (run_dir / "config.toml").is_file()
    audio = cfg.model.modality == "audio"
    level = "token" if audio else "sample"
    names = ["train", "test", *(["unseen_voice"] if audio else [])]
    return Labelled({name: Random(cfg, level, i) for i, name in enumerate(names)}, ["a", "b", "c"], level)


@pytest.fixture(scope="module", autouse=True)
def small_data(tmp_path_factory):
    """Files and labels in place of the embedded sets: the demo's own code is under test."""
    folder = tmp_path_factory.mktemp("data")
    pictures = np.random.default_rng(0).integers(0, 255, (40, 24, 24)).astype(np.uint8)
    np.savez(folder / "pictures.npz", images=pictures)
    paths = {"image": str(folder / "pictures.npz")}
    paths |= {name: make_data(name, folder / name) for name in ("audio", "text")}
    tasks = {name: dataclasses.replace(task, data=paths[name]) for name, task in TASKS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TASKS", tasks)
        patch.setattr(demo, "open_labelled", labelled_at_random)
        yield


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The folder of a demo made anew, and the summaries of both times."""
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    first = run_demo(out, 1.0, CONFIGS)
    (out / "left over").touch()
    return out, first, run_demo(out, 1.0, CONFIGS)


def results_of(summary):
    return {name: summary[name] for name in TASKS}


def test_the_summary_holds_what_the_demo_promises(twice):
    out, _, second = twice
    assert json.loads((out / "summary.json").read_text()) == second
    for name, found in results_of(second).items():
        assert found["steps"] == 2 and found["seconds"] > 0, name
        assert found["loss_first"] > 0 and found["loss_last"] > 0 and found["target_variance"] > 0
        assert [step for step, _ in found["losses"]] == [1, 2]
        splits = {"test", "unseen_voice"} if name == "audio" else {"test"}
        for source in ("raw", "untrained", "trained"):
            for kind in ("linear", "knn"):
                assert set(found["probe"][source][kind]) == splits
                assert all(0 <= accuracy <= 1 for accuracy in found["probe"][source][kind].values())
    assert second["seconds"] > 0 and second["machine"]["threads"] > 0
    for name in ("plots/loss.png", "plots/probe.png", "image_tiny/config.toml", "text_tiny/metrics.jsonl"):
        assert (out / name).stat().st_size > 0, name


def test_starting_anew_gives_the_same_numbers_and_leaves_nothing_behind(twice):
    out, first, second = twice
    assert not (out / "left over").exists()
    for name, found in results_of(first).items():
        again = second[name]
        assert {k: v for k, v in found.items() if k != "seconds"} == {
            k: v for k, v in again.items() if k != "seconds"
        }


def test_the_encoders_probed_are_the_start_and_the_end_of_the_run(tmp_path, monkeypatch):
    probed = []

    def keep(model, labelled, **keywords):
        probed.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"linear": {"test": 0.5}, "knn": {"test": 0.5}}

    monkeypatch.setattr(demo, "probe_model", keep)
    monkeypatch.setattr(demo, "TASKS", {"image": demo.TASKS["image"]})
    run_demo(tmp_path / "demo", 1.0, CONFIGS)
    cfg = scaled(CONFIGS["image"], 1.0)
    start = Trainer(cfg, torch.device("cpu")).model.state_dict()
    end = load(tmp_path / "demo" / "image_tiny").state_dict()
    assert all(torch.equal(probed[0][name], start[name]) for name in start)
    assert all(torch.equal(probed[1][name], end[name]) for name in end)
    assert any(not torch.equal(start[name], end[name]) for name in end)


def test_a_folder_that_is_no_demo_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else than a demo"):
        run_demo(tmp_path, 1.0, CONFIGS)
    with pytest.raises(ValueError, match="is a file"):
        run_demo(tmp_path / "thesis.tex", 1.0, CONFIGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_that_stops_early_stops_the_demo(tmp_path, monkeypatch):
    real = demo.run
    monkeypatch.setattr(demo, "run", lambda cfg, data, out: real(cfg, data, out, stop=lambda step: True))
    with pytest.raises(RunError, match="image_tiny stopped at step 1"):
        run_demo(tmp_path / "demo", 1.0, CONFIGS)
    assert (tmp_path / "demo" / MARKER).exists()


def test_scaling_keeps_the_shape_of_the_schedules():
    cfg = preset("image_tiny")
    half = scaled(cfg, 0.5)
    assert half.train.steps == round(cfg.train.steps / 2)
    assert half.optim.warmup == round(cfg.optim.warmup / 2)
    assert half.ema.anneal == round(cfg.ema.anneal / 2)
    assert scaled(cfg, 1e-9).train.steps == 1
    assert (half.model, half.data, half.optim.lr) == (cfg.model, cfg.data, cfg.optim.lr)


def result(untrained, trained, raw=0.3, seconds=10.0, alarms=()):
    probe = {
        name: {"linear": {"test": value}, "knn": {"test": 0.123}}
        for name, value in (("raw", raw), ("untrained", untrained), ("trained", trained))
    }
    return {
        "label": "which digit", "steps": 1_200, "seconds": seconds, "loss_first": 9.5, "loss_last": 1.25,
        "target_variance": 0.5, "alarms": list(alarms), "probe": probe,
    }  # fmt: skip


def test_the_table_shows_every_number():
    head, names, line = table({"image": result(0.31, 0.528)})
    assert "linear probe" in head
    assert line.split("digit")[1].split() == [
        "test", "30.0", "(12.3)", "31.0", "(12.3)", "52.8", "(12.3)", "+21.8",
        "1,200", "10", "9.50>1.25", "0.50",
    ]  # fmt: skip
    assert len(names) == len(line)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (result(0.31, 0.55), []),
        (result(0.45, 0.55), ["image, test: +10.0 points over untrained, 15 wanted"]),
        (result(0.31, 0.49, raw=0.4), ["image, test: +9.0 points over raw, 20 wanted"]),
        (result(0.31, 0.55, seconds=301), ["image took 5.0 minutes; two idle cores need less than 5"]),
        (result(0.31, 0.55, alarms=["target_rank"]), ["image: alarms during training: target_rank"]),
    ],
)
def test_what_falls_short_is_said(found, said):
    *lines, last = remarks({"image": found}, 1.0)
    assert last == TEXT_NOTE
    assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines, strict=True))


def test_an_encoder_that_did_not_gain_is_said_where_any_gain_would_do():
    lines = remarks({"text": result(0.4, 0.4, raw=0.9)}, 1.0)
    assert lines[0] == "short of the mark: text, test: +0.0 points over untrained, more than 0 wanted"
    assert len(lines) == 2
