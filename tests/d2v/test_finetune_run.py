"""Runs of `d2v finetune` on small data: learning, resuming bit for bit, scores, errors, the command line."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import d2v
from d2v.cli.main import main
from d2v.config.presets import preset
from d2v.config.recipes import default_recipe, with_drops
from d2v.config.toml import CheckpointError, read_tuned_config
from d2v.data.tune import open_tune_data
from d2v.data.types import Batch, DataError, Position
from d2v.evaluate.scores import run_eval
from d2v.model.tuned import FineTuned
from d2v.train.finetune_step import Tuner
from d2v.train.progress import read_metrics
from tests.d2v.test_resume import assert_same_run
from tests.d2v.tiny_runs import LINES, make_data, resume_finetune, run_finetune
from tests.d2v.tiny_tuning import RECIPES, config
from tests.d2v.transfers import no_transfers


@pytest.mark.parametrize("letters", ["|ab", "|AB"])
def test_transcripts_and_scores_take_the_case_of_the_vocabulary(
    letters: str, encoders: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "dict.txt").write_text("".join(f"{letter} 1\n" for letter in letters))
    cfg = dataclasses.replace(config(encoders["audio"], "audio"), vocabulary=str(tmp_path / "dict.txt"))
    found = open_tune_data(data["audio"], cfg, device=torch.device("cpu"), encoder_dir=None, run_dir=tmp_path)
    assert set(np.concatenate(found.labels(torch.arange(24)))) == {4, 5, 6}
    texts = [text for _, _, some in found.parts["dev"].batches(4) for text in some]
    assert set("".join(texts)) == set(letters[1:])


@pytest.mark.parametrize("modality", RECIPES)
def test_a_loss_waits_for_no_device(
    modality: str,
    encoders: dict[str, Path],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Meta tensors have no values: reading one, as waiting for a GPU does, is an error."""
    cfg = config(encoders[modality], modality)
    found = open_tune_data(
        data[modality], cfg, device=torch.device("cpu"), encoder_dir=encoders[modality], run_dir=tmp_path
    )
    cfg = dataclasses.replace(cfg, head=dataclasses.replace(cfg.head, outputs=found.outputs))
    meta = torch.device("meta")
    shape = Tuner(cfg, found, meta)
    batch = next(found.loader.micro_batches(Position(), 8))[0]
    labels = found.labels

    def moved(ids: torch.Tensor) -> Any:
        assert ids.device.type == "cpu"
        given = labels(ids)
        return given.to(meta, non_blocking=True) if isinstance(given, torch.Tensor) else given

    def ctc(log_probs: torch.Tensor, targets: torch.Tensor, *lengths: torch.Tensor, **_: Any) -> torch.Tensor:
        """PyTorch has none for meta tensors; lengths in the host's memory it takes without waiting."""
        assert targets.device == meta and all(length.device.type == "cpu" for length in lengths)
        return log_probs.sum()

    monkeypatch.setattr(torch.nn.functional, "ctc_loss", ctc)
    shape.data = dataclasses.replace(found, labels=moved)
    batch = batch.to(meta)
    with no_transfers(inputs=True):  # labels and masks of the host are inputs too
        loss = shape.loss(*shape.prepare([batch]))
        loss.backward()
        assert all(p.grad is not None for p in shape.model.parameters() if p.requires_grad)
        shape.update([loss.detach()], 1e-3, cfg.optim.clip)
    assert loss.device == meta and loss.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


def learnt_from(tuner: Tuner, step: list[Batch]) -> dict[str, Any]:
    """What the model gets of a step, its micro-batches joined again; padding filled up to the longest."""
    ready = tuner.prepare(step)
    found: dict[str, Any] = {}
    for name in ("source", "labels", "time_mask", "channel_mask", "noise"):
        parts = [getattr(part, name) for part in ready]
        if isinstance(parts[0], torch.Tensor):
            longest = max(part.shape[-1] for part in parts)
            found[name] = torch.cat([F.pad(part, (0, longest - part.shape[-1]), value=1) for part in parts])
        elif parts[0] is not None:
            found[name] = torch.tensor([letter for part in parts for some in part for letter in some])
    return found


@pytest.mark.parametrize("modality", RECIPES)
def test_a_step_does_not_depend_on_the_micro_batch(
    modality: str, encoders: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    """Pictures, mixing, masks and noise bit for bit, whatever was drawn before; gradients to rounding."""
    cfg = config(encoders[modality], modality)
    still = dataclasses.replace(cfg.drop, dropout=0.0, layer=0.0, path=0.0)
    augment = dataclasses.replace(cfg.augment, cutmix=1.0, mix_batch=12, erase=0.5)
    wide = dataclasses.replace(cfg.span, channel_prob=0.5)
    cfg = with_drops(dataclasses.replace(cfg, drop=still, augment=augment, span=wide))
    found = open_tune_data(
        data[modality], cfg, device=torch.device("cpu"), encoder_dir=encoders[modality], run_dir=tmp_path
    )
    cfg = dataclasses.replace(cfg, head=dataclasses.replace(cfg.head, outputs=found.outputs))
    tuner = Tuner(cfg, found, torch.device("cpu"))
    runs: list[list[dict[str, Any]]] = []
    for seed, (micro, count) in enumerate(((cfg.data.batch, 1), (2, 2), (1, 5))):
        torch.manual_seed(seed)  # as if other numbers of forward passes had been made
        steps = list(itertools.islice(found.loader.micro_batches(Position(), micro), 2))
        assert min(map(len, steps)) >= count
        seen = []
        for step in steps:
            values = learnt_from(tuner, step)
            for part in tuner.prepare(step):
                (tuner.loss(part) / sum(map(len, step))).backward()
            values["gradient"] = torch.cat([p.grad.flatten() for p in tuner.parameters if p.grad is not None])
            tuner.optimizer.zero_grad()
            seen.append(values)
        runs.append(seen)
    for seen in runs[1:]:
        for whole, split in zip(runs[0], seen, strict=True):
            gradient = whole["gradient"]
            assert float((split["gradient"] - gradient).norm() / gradient.norm()) < 1e-4
            assert whole.keys() == split.keys()
            for name in whole.keys() - {"gradient"}:
                assert torch.equal(whole[name], split[name]), name
    first, second = runs[0]
    if modality == "image":
        assert not torch.equal(first["source"], second["source"]) and (first["labels"] % 1).any()
    if modality == "audio":
        assert first["time_mask"].any() and first["channel_mask"].any()
        assert (first["time_mask"].sum(1) == first["noise"].shape[1]).all()


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("modality", RECIPES)
def test_resumed_runs_are_bitwise_the_unbroken_one(
    modality: str, capturable: bool, encoders: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    cfg = config(encoders[modality], modality)

    def at(last: int) -> Callable[[int], bool]:
        return lambda step: step == last

    given = (cfg, encoders[modality], data[modality])
    whole = run_finetune(*given, tmp_path / "whole")
    assert whole.finished and whole.exit_code == 0
    first = run_finetune(*given, tmp_path / "parts", stop=at(3))
    assert (first.step, first.finished, first.scores) == (3, False, {})
    assert not resume_finetune(tmp_path / "parts", stop=at(5)).finished
    last = resume_finetune(tmp_path / "parts")
    assert last.finished and (last.scores, last.best) == (whole.scores, whole.best)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert resume_finetune(tmp_path / "parts").scores == whole.scores  # nothing is left to do


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("modality", RECIPES)
def test_evaluation_is_on_the_backends_of_the_run(
    modality: str,
    encoders: dict[str, Path],
    data: dict[str, str],
    chosen: Callable[[Callable[[], object]], set[str]],
    tmp_path: Path,
) -> None:
    """While training and by `d2v eval`, unless that is asked for others."""
    own, out = "eager,residual_norm=triton", tmp_path / "run"
    cfg = config(encoders[modality], modality, steps=1, backend=own)
    given = ["eval", str(out)]

    assert chosen(lambda: run_finetune(cfg, encoders[modality], data[modality], out)) == {"triton"}
    assert chosen(lambda: run_eval(out)) == {"triton"}
    assert chosen(lambda: main([*given, "--backend", "eager"]) == 0) == {"eager"}
    assert chosen(lambda: main([*given, "--backend=eager", "--backend.residual_norm=triton"]) == 0) == {
        "triton"
    }
    assert main([*given, "--backend", "eagre"]) == 2


@pytest.mark.parametrize(
    ("modality", "steps", "score"),
    [("image", 60, "test/top1"), ("text", 30, "dev/accuracy"), ("audio", 150, "dev/wer")],
)
def test_runs_learn_and_eval_gives_the_scores_again(
    modality: str,
    steps: int,
    score: str,
    encoders: dict[str, Path],
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = config(encoders[modality], modality, steps=steps, evaluate_every=steps // 2)
    plain = dataclasses.replace(cfg.augment, mixup=0.0, rand_ops=0, erase=0.0)
    still = dataclasses.replace(cfg.drop, dropout=0.0, layer=0.0, path=0.0)
    span = dataclasses.replace(cfg.span, time_prob=0.0, channel_prob=0.0)
    cfg = with_drops(dataclasses.replace(cfg, augment=plain, drop=still, span=span))
    result = run_finetune(cfg, encoders[modality], data[modality], tmp_path / "run")
    good = result.scores[score] < 0.35 if score.endswith("wer") else result.scores[score] > 0.9
    assert good, result.scores
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if score in row] == [steps // 2, steps]
    assert (tmp_path / "run" / "plots" / "scores.png").exists()
    capsys.readouterr()
    again = run_eval(tmp_path / "run")
    assert again[score] == result.best and f"{score} " in capsys.readouterr().out
    model = d2v.load(tmp_path / "run")
    assert isinstance(model, FineTuned) and not model.training
    if modality == "audio":
        assert run_eval(tmp_path / "run", beam=8)[score] <= again[score] + 0.2
    other = undivided(modality, data[modality], tmp_path / "other")
    capsys.readouterr()
    whole = run_eval(tmp_path / "run", str(other))
    assert {name.partition("/")[0] for name in whole} == {"all"}, "without parts all of it is scored"
    assert "(4 samples)" in capsys.readouterr().out
    if modality == "text":
        other.write_text(other.read_text() + '{"text": "y", "label": "dog"}\n')
        with pytest.raises(DataError, match="class 'dog' is not among the training classes"):
            run_eval(tmp_path / "run", str(other))
    newest = run_eval(tmp_path / "run", step=steps)
    assert newest == pytest.approx(result.scores)


def undivided(modality: str, data: str, other: Path) -> Path:
    """Four samples without parts, of pictures and texts one class alone."""
    if modality == "image":
        with np.load(data) as arrays:
            chosen = arrays["labels"] == 1
            images, labels = arrays["images"][chosen][:4], arrays["labels"][chosen][:4]
        np.savez(other.with_suffix(".npz"), images=images, labels=labels)
        return other.with_suffix(".npz")
    if modality == "text":
        lines = (Path(data) / "dev.jsonl").read_text().splitlines()
        cats = [f"{line}\n" for line in lines if '"cat"' in line]
        other.with_suffix(".jsonl").write_text("".join(cats[:4]))
        return other.with_suffix(".jsonl")
    other.mkdir()
    for name in [f"{i}{suffix}" for i in range(4) for suffix in (".wav", ".txt")]:
        shutil.copyfile(Path(data) / "dev" / name, other / name)
    return other


def test_a_frozen_encoder_stays_while_the_head_learns(
    encoders: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    cfg = config(encoders["image"], "image", freeze_steps=3)
    pretrained = d2v.load(encoders["image"]).state_dict()
    moved = []
    for steps in (3, 4):
        short = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps))
        run_finetune(short, encoders["image"], data["image"], tmp_path / str(steps))
        tuned = d2v.load(tmp_path / str(steps), step=steps).state_dict()
        moved.append(
            [
                k
                for k, v in tuned.items()
                if not torch.equal(v, pretrained.get(k.removeprefix("model."), v + 1))
            ]
        )
    assert sorted(moved[0]) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert len(moved[1]) > 20


def test_from_scratch_differs_and_layer_decay_slows_low_blocks(
    encoders: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    cfg = config(encoders["image"], "image", steps=2, layer_decay=0.1)
    pretrained = d2v.load(encoders["image"]).state_dict()
    run_finetune(cfg, encoders["image"], data["image"], tmp_path / "tuned")
    run_finetune(cfg, encoders["image"], data["image"], tmp_path / "scratch", scratch=True)
    tuned, scratch = (d2v.load(tmp_path / name, step=2).state_dict() for name in ("tuned", "scratch"))
    key = "blocks.{}.mlp.fc1.weight"
    distance = [(tuned[f"model.{key.format(i)}"] - pretrained[key.format(i)]).norm() for i in (0, 1)]
    assert 0 < distance[0] < 0.3 * distance[1]
    far = (scratch[f"model.{key.format(0)}"] - pretrained[key.format(0)]).norm()
    assert far > 10 * distance[0]


def test_bad_steps_are_skipped_and_stop_the_run(
    encoders: dict[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(encoders["text"], "text", max_bad_steps=2)
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=1e30, clip=None))
    result = run_finetune(cfg, encoders["text"], data["text"], tmp_path / "run")
    assert (result.exit_code, result.finished) == (1, False)
    assert "stopped: 2 bad steps in a row" in capsys.readouterr().out


def test_errors_leave_nothing_behind(encoders: dict[str, Path], data: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match="labels missing"):
        run_finetune(config(encoders["image"], "image"), encoders["image"],
                     make_data("image", tmp_path / "plain"), out)  # fmt: skip
    assert not out.exists()
    with pytest.raises(CheckpointError, match="not a run directory"):
        run_finetune(config(encoders["image"], "image"), tmp_path, data["image"], out)
    assert not out.exists()
    small = config(encoders["image"], "image")
    small = dataclasses.replace(small, head=dataclasses.replace(small.head, outputs=1))
    with pytest.raises(ValueError, match="head.outputs must be at least 2, as the data have, got 1"):
        run_finetune(small, encoders["image"], data["image"], out)
    with pytest.raises(ValueError, match="unknown backend"):
        run_finetune(
            config(encoders["image"], "image", backend="magic"), encoders["image"], data["image"], out
        )
    assert not out.exists()


def test_the_command(
    encoders: dict[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    given = ["finetune", str(encoders["image"]), "--task", "classify", "--data", data["image"], "--out", out,
             "--train.steps", "3", "--train.device", "cpu", "--drop.path", "0.2", "--data.batch", "16",
             "--data-limit", "32"]  # fmt: skip
    assert main(given) == 0
    cfg, where, encoder = read_tuned_config(out)
    assert (cfg.recipe, cfg.drop.path, cfg.data_limit, cfg.head.outputs) == ("image_tiny", 0.2, 32, 2)
    assert (where, encoder) == (data["image"], str(encoders["image"]))
    assert "32 training samples, test 16; 2 outputs" in capsys.readouterr().out
    assert main(["finetune", "--resume", out]) == 0
    assert main(["eval", out]) == 0
    assert "test/top1" in capsys.readouterr().out
    assert main(["plot", out]) == 0
    for place in ("best", "checkpoints/step_3"):
        assert main(["eval", f"{out}/{place}"]) == 0
        assert "test/top1" in capsys.readouterr().out
    inside, file, folder = f"{out}/checkpoints/step_3", str(tmp_path / "x.pt"), str(tmp_path / "folder")
    assert main(["convert", inside, file, "--to", "original"]) == 0
    assert main(["convert", inside, folder, "--to", "safetensors"]) == 0
    assert main(given) == 2 and "holds a run already" in capsys.readouterr().err
    for wrong, words in (
        (["finetune", "--task", "classify"], "RUN is missing"),
        (["finetune", str(encoders["image"]), "--task", "classify"], "--data PATH is missing"),
        (["finetune", str(encoders["image"]), "--data", "x"], "--task TASK is missing"),
        ([*given, "--recipe", "glue_rte"], "recipe glue_rte is for task sentence, got --task classify"),
        ([*given, "--recipe", "imagenet"], "no recipe 'imagenet'; nearest: imagenet_"),
        ([*given, "--train.steps", "0"], "config: train.steps must be positive, got 0"),
        ([*given, "--train.seed", "-1"], "config: train.seed must be in 0 .. 2^64 - 1, got -1"),
        (["finetune", "--resume", out, "--out", "y"], "--resume OUT goes alone"),
        (["probe", out, "--data", data["image"]], "is fine-tuned: a pretrained model is needed"),
        (["eval", str(encoders["image"])], "not a fine-tuning run: it has no [head]"),
        *((["eval", path], "a run of `d2v finetune` is needed") for path in (file, folder, str(tmp_path))),
        *((["eval", f"{encoders['image']}/{place}"], "it has no [head]")
          for place in ("checkpoints", "checkpoints/step_2")),
        *(([*command, "--data", data["image"]], "is fine-tuned: a pretrained model is needed")
          for path in (out, inside, f"{out}/best", file, folder)
          for command in (["probe", path], ["extract", path, "--out", file],
                          ["finetune", path, "--task", "classify", "--out", str(tmp_path / "y")])),
        (["convert", inside, str(tmp_path / "y"), "--to", "safetensors", "--step", "3"], "step must be None"),
    ):  # fmt: skip
        assert main(wrong) == 2, wrong
        said = capsys.readouterr().err
        assert words in said, wrong
        assert said.count("\n") == 1 or "nearest" in said or "config:" in said, said


def test_default_recipes() -> None:
    found = {
        (task, name): default_recipe(task, preset(name).model)  # type: ignore[arg-type]
        for task, name in (
            ("classify", "image_tiny"), ("classify", "image_base"), ("classify", "image_large"),
            ("classify", "audio_tiny"), ("ctc", "audio_base"), ("ctc", "audio_large"), ("ctc", "audio_tiny"),
            ("sentence", "text_base"), ("sentence", "text_tiny"),
        )
    }  # fmt: skip
    assert list(found.values()) == [
        "image_tiny", "imagenet_base", "imagenet_large", "sound_tiny", "librispeech_100h_base",
        "librispeech_100h_large", "speech_tiny", "glue_sst2", "text_tiny",
    ]  # fmt: skip


def test_columns_hold_from_check_to_eval(
    encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pair of options for two tables; without them a line says what is missing."""
    rows = [f'{n},"{LINES[n % 4]}, {LINES[n % 3]}",{"ab"[n % 4 // 2]}' for n in range(48)]
    for part in ("train", "dev"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{part}.csv").write_text("\n".join(["id,review,stars", *rows]) + "\n")
    data, run, tuned = str(tmp_path / "data"), str(encoders["text"]), str(tmp_path / "tuned")
    columns = ["--data.text-column", "review", "--data.label-column", "stars"]
    assert main(["check", "--data", data, "--preset", "text_tiny", *columns[:2]]) == 1  # few
    assert "48 samples, 48 usable, 0 unreadable, 0 skipped" in capsys.readouterr().out
    assert main(["check", "--data", data, "--preset", "text_tiny"]) == 1
    assert "has no column 'text', its columns: id, review, stars" in capsys.readouterr().out
    assert main(["probe", run, "--data", data, "--kind", "knn", *columns]) == 0
    assert "knn, features" in capsys.readouterr().out
    small = ["--train.steps", "1", "--data.batch", "2", "--data.block", "16"]
    tune = ["finetune", run, "--task", "sentence", "--data", data, "--out", tuned, *small]
    assert main([*tune, *columns]) == 0
    assert main(["eval", tuned, "--data", data]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["probe", run, "--data", data, *columns[:2]]) == 2
    assert 'has no "label" that is a string or a number' in capsys.readouterr().err
    assert main(["probe", str(encoders["image"]), "--data", "digits", *columns[:2]]) == 2
    assert "--data.text-column has no effect for image" in capsys.readouterr().err
    assert main([*tune, "--glue", "rte", *columns[:2], "--out", f"{tuned}2"]) == 2
    assert "--data.text-column has no effect" in capsys.readouterr().err
