"""What the one run loop gives fine-tuning too: files left out, the same data, errors that save."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from PIL import Image

from d2v.cli.main import main
from d2v.config.run import ProbeConfig
from d2v.data.loader import Loader
from d2v.data.types import Batch, DataError, Position, Report
from d2v.evaluate.scores import evaluate, run_eval
from d2v.model import Pretraining
from d2v.train.checkpoint import latest_checkpoint, load_checkpoint
from d2v.train.data_record import MOST_SAID, SaidOfData
from d2v.train.finetune import TuningRun
from d2v.train.loop import RunError, claim
from d2v.train.pretrain import Scores, run
from d2v.train.progress import read_metrics
from tests.d2v.test_resume import assert_same_run
from tests.d2v.tiny_runs import make_data, resume_finetune, run_finetune, tiny
from tests.d2v.tiny_tuning import RECIPES, config

pytestmark = pytest.mark.usefixtures("no_plots")


def spoil(path: Path) -> None:
    """Half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pictures(folder: Path) -> Path:
    """104 pictures of two classes and 4 of a test part; the path of one of the training part."""
    for part, count in (("train", 52), ("test", 2)):
        for kind in ("dark", "light"):
            (folder / part / kind).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((12, 12), 2 * i + 100 * (kind == "light"), np.uint8)
                Image.fromarray(pixels).save(folder / part / kind / f"{i:02}.png")
    return folder / "train" / "dark" / "07.png"


def utterances(folder: Path) -> Path:
    """104 short sounds with transcripts and 2 of a held-out part; the path of one of the training part."""
    t = np.arange(5_600) / 16_000
    for part, count in (("train", 104), ("dev", 2)):
        (folder / part).mkdir(parents=True)
        for i in range(count):
            tone = 0.3 * np.sin(2 * np.pi * (300 + i) * t)
            soundfile.write(folder / part / f"{i:03}.wav", tone, 16_000)
            (folder / part / f"{i:03}.txt").write_text("AB")
    return folder / "train" / "007.wav"


def sounds(folder: Path) -> Path:
    """104 sounds of two classes and 4 of a test part; the path of one of the training part."""
    t = np.arange(9_600) / 16_000
    for part, count in (("train", 52), ("test", 2)):
        for kind in ("high", "low"):
            (folder / part / kind).mkdir(parents=True)
            for i in range(count):
                tone = 0.3 * np.sin(2 * np.pi * ({"high": 2_000, "low": 300}[kind] + i) * t)
                soundfile.write(folder / part / kind / f"{i:03}.wav", tone, 16_000)
    return folder / "train" / "low" / "007.wav"


def texts(folder: Path) -> Path:
    """A file of 104 lines, one of them no JSON, and one of 2 lines of a held-out part; the former's path."""
    folder.mkdir()
    for part, count in (("train", 103), ("dev", 2)):
        lines = [json.dumps({"text": f"{i} words", "label": ("even", "odd")[i % 2]}) for i in range(count)]
        (folder / f"{part}.jsonl").write_text(
            "\n".join([*lines, *(["half a li"] if part == "train" else [])])
        )
    return folder / "train.jsonl"


@pytest.mark.parametrize(
    ("modality", "make", "recipe"),
    [
        ("image", pictures, None),
        ("audio", utterances, None),
        ("audio", sounds, "sound_tiny"),
        ("text", texts, None),
    ],
)
def test_fine_tuning_names_what_it_cannot_read_and_records_its_data(
    modality: str,
    make: Any,
    recipe: str | None,
    encoders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = make(tmp_path / "data")
    (tmp_path / "data" / "notes.docx").write_bytes(b"")
    line = ":104" if make is texts else ""
    if not line:
        spoil(bad)
    steps = {"image": 7, "audio": 14, "text": 1}[modality]  # more than an epoch
    cfg = config(encoders[modality], modality, name=recipe, steps=steps, evaluate_every=100)
    run_finetune(cfg, encoders[modality], str(tmp_path / "data"), tmp_path / "run")
    said = [x for x in capsys.readouterr().out.splitlines() if "cannot be read, left out: " in x]
    assert len(said) == 1 and f"{bad.name}{line}: " in said[0]
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert record["left_out"] == {"suffix .docx is not read": ["notes.docx"]}
    assert [Path(name).name for name in record["unreadable"]] == [f"{bad.name}{line}"]
    assert record["total"] == (106 if line else 104)  # of texts the lines of all parts
    parts, labels = {
        pictures: ({"test": 4}, ["dark", "light"]),
        utterances: ({"dev": 2}, ["<s>", "<pad>", "</s>", "<unk>", "A", "B", "|"]),
        sounds: ({"test": 4}, ["high", "low"]),
        texts: ({"dev": 2}, ["even", "odd"]),
    }[make]
    assert record["parts"] == parts and record["labels"] == labels


@pytest.mark.parametrize("modality", RECIPES)
@pytest.mark.parametrize("part", ["train", "held-out"])
def test_fine_tuning_resumes_on_the_same_data_only(
    part: str, modality: str, encoders: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    mine = tmp_path / "data"
    shutil.copytree(data["image"].rpartition("/")[0] if modality == "image" else data[modality], mine)
    path = str(mine / "x.npz") if modality == "image" else str(mine)
    cfg = config(encoders[modality], modality, steps=3, evaluate_every=100)
    run_finetune(cfg, encoders[modality], path, tmp_path / "run", stop=lambda step: step == 1)
    before = (tmp_path / "run" / "config.toml").read_text()
    if modality == "image":
        arrays = dict(np.load(path))
        other = np.array(["left", "right"])[arrays["labels"]] if part == "held-out" else arrays["labels"][:60]
        np.savez(path, images=arrays["images"][: len(other)], labels=other)
    elif modality == "text":
        name = {"train": "train", "held-out": "dev"}[part]
        lines = (mine / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (mine / f"{name}.jsonl").write_text("".join(lines[:-2]))
    else:
        (mine / {"train": "train", "held-out": "dev"}[part] / "0.wav").unlink()
    with pytest.raises(ValueError, match="was begun with .*: it can only be resumed on the same data"):
        resume_finetune(tmp_path / "run")
    assert (tmp_path / "run" / "config.toml").read_text() == before


class GivesOut:
    """Data that end with an error before global step `at` of the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: Exception) -> None:
        original = Loader.micro_batches

        def micro_batches(loader: Loader, start: Position, micro: int) -> Iterator[list[Batch]]:
            for number, batches in enumerate(original(loader, start, micro), 1):
                if number == at:
                    raise error
                yield batches

        monkeypatch.setattr(Loader, "micro_batches", micro_batches)


@pytest.mark.parametrize("error", [DataError("data: gone"), OSError("gone"), RuntimeError("worker gone")])
@pytest.mark.parametrize("modality", RECIPES)
def test_when_data_give_out_what_was_trained_is_saved(
    modality: str,
    error: Exception,
    encoders: dict[str, Path],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config(encoders[modality], modality, steps=4, evaluate_every=3)
    given = (cfg, encoders[modality], data[modality])
    if isinstance(error, DataError):
        run_finetune(*given, tmp_path / "whole")
    with monkeypatch.context() as patched:
        GivesOut(patched, 3, error)
        with pytest.raises(
            RunError, match=r"step 3: .*gone\n.*is saved: continue with `d2v finetune --resume"
        ):
            run_finetune(*given, tmp_path / "run")
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None and load_checkpoint(newest).step == 2
    if isinstance(error, DataError):
        resume_finetune(tmp_path / "run")
        assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_pretraining_saves_after_a_worker_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_data("image", tmp_path / "data")
    GivesOut(monkeypatch, 3, RuntimeError("DataLoader worker is killed"))
    with pytest.raises(RunError, match=r"step 3: DataLoader worker is killed\n.*`d2v train --resume"):
        run(tiny("image"), images, tmp_path / "r")
    newest = latest_checkpoint(tmp_path / "r")
    assert newest is not None and load_checkpoint(newest).step == 2


def test_what_fails_before_the_first_step_leaves_nothing(
    encoders: dict[str, Path], data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GivesOut(monkeypatch, 1, OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        run_finetune(config(encoders["text"], "text"), encoders["text"], data["text"], tmp_path / "run")
    with pytest.raises(OSError, match="gone"):
        run(tiny("image"), make_data("image", tmp_path / "data"), tmp_path / "r")
    assert not (tmp_path / "run").exists() and not (tmp_path / "r").exists()


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("modality", RECIPES)
def test_scores_that_fail_cost_nothing_that_was_trained(
    modality: str,
    step: int,
    encoders: dict[str, Path],
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor the scores: the run that goes on makes up for them, after its last step too."""
    calls = 0

    def broken(*given: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == step - 1:
            raise MemoryError("no scores")
        return evaluate(*given)

    cfg = config(encoders[modality], modality, steps=3, evaluate_every=2)
    given = (cfg, encoders[modality], data[modality])
    whole = run_finetune(*given, tmp_path / "whole")
    with pytest.raises(MemoryError, match="no scores"):
        run_finetune(*given, tmp_path / "run", evaluate=broken)
    assert f"is saved: continue with `d2v finetune --resume {tmp_path / 'run'}`" in capsys.readouterr().out
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None and load_checkpoint(newest).step == step
    calls = step - 2
    with pytest.raises(MemoryError, match="no scores"):  # once more
        resume_finetune(tmp_path / "run", evaluate=broken)
    resumed = resume_finetune(tmp_path / "run")
    assert resumed.scores == whole.scores and resumed.best == whole.best
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    best = [load_checkpoint(latest_checkpoint(tmp_path / name / "best")) for name in ("whole", "run")]  # type: ignore[arg-type]
    assert best[0].step == best[1].step
    assert all(torch.equal(best[0].model[name], tensor) for name, tensor in best[1].model.items())


@pytest.mark.parametrize("modality", RECIPES)
@pytest.mark.parametrize("killed", ["saving", "scored"])
def test_a_run_that_is_killed_within_an_error_is_resumed_exactly(
    killed: str,
    modality: str,
    encoders: dict[str, Path],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it saves after its data gave out; or when it has made up for scores, before it saves."""

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    def broken(*_: Any) -> dict[str, float]:
        raise MemoryError("no scores")

    cfg = config(encoders[modality], modality, steps=4, evaluate_every=3)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, save_every=2))
    given = (cfg, encoders[modality], data[modality])
    run_finetune(*given, tmp_path / "whole")
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        if killed == "saving":
            GivesOut(patched, 4, DataError("data: gone"))
            original = safetensors.torch.save_file

            def save_file(tensors: Any, path: Path) -> None:
                original(tensors, path)
                if path.parent == out / "checkpoints" / ".tmp-step_3":
                    raise Killed

            patched.setattr(safetensors.torch, "save_file", save_file)
            with pytest.raises(Killed):
                run_finetune(*given, out)
            assert (out / "checkpoints" / ".tmp-step_3").is_dir()
        else:
            with pytest.raises(MemoryError):
                run_finetune(*given, out, evaluate=broken)
            patched.setattr(TuningRun, "_save", kill)
            with pytest.raises(Killed):
                resume_finetune(out)
            assert any("/" in name for name in read_metrics(out)[-1])
    resume_finetune(out)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("step", [2, 3])
def test_a_probe_that_fails_costs_nothing_that_was_trained(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    class Probe:
        def __init__(self, *_: Any) -> None:
            pass

        def run(self, model: Pretraining) -> Scores:
            nonlocal calls
            calls += 1
            if calls == step - 1:
                raise MemoryError("no probe")
            return Scores({"probe/test/knn": float(model.state_dict()["blocks.0.norm1.bias"].sum())}, "")

    cfg = dataclasses.replace(tiny("image", steps=3), probe=ProbeConfig(every=2))
    images = make_data("image", tmp_path / "data")
    with pytest.raises(MemoryError, match="no probe"):
        run(cfg, images, tmp_path / "r", probe=Probe)
    assert "is saved: continue with `d2v train --resume" in capsys.readouterr().out
    newest = latest_checkpoint(tmp_path / "r")
    assert newest is not None and load_checkpoint(newest).step == step
    run(cfg, images, tmp_path / "r", probe=Probe, resume=True)
    run(cfg, images, tmp_path / "whole", probe=Probe)
    assert_same_run(tmp_path / "whole", tmp_path / "r")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("modality", RECIPES)
def test_what_reads_a_run_writes_nothing_into_it(
    modality: str,
    encoders: dict[str, Path],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "cache"))
    cfg = config(encoders[modality], modality, steps=1)
    run_finetune(cfg, encoders[modality], data[modality], tmp_path / "run")
    tuned, encoder = contents(tmp_path / "run"), contents(encoders[modality])
    run_eval(tmp_path / "run")
    run_eval(tmp_path / "run", data[modality])
    assert contents(tmp_path / "run") == tuned
    run_of, features = str(encoders[modality]), str(tmp_path / "features.npz")
    assert main(["extract", run_of, "--data", data[modality], "--out", features]) == 0
    if modality != "audio":
        assert main(["probe", run_of, "--data", data[modality]]) == 0
    assert main(["convert", run_of, str(tmp_path / "converted"), "--to", "safetensors"]) == 0
    assert contents(encoders[modality]) == encoder
    folder = tmp_path / "hf"
    assert main(["convert", run_of, str(folder), "--to", "hf"]) == 0
    exported = contents(folder)
    assert main(["extract", f"hf:{folder}", "--data", data[modality], "--out", features]) == 0
    if modality != "audio":
        assert main(["probe", f"hf:{folder}", "--data", data[modality]]) == 0
    assert contents(folder) == exported


def test_the_folder_of_a_run_is_told_how_it_goes_on(
    encoders: dict[str, Path], data: dict[str, str], tmp_path: Path
) -> None:
    cfg = config(encoders["text"], "text", steps=1)
    run_finetune(cfg, encoders["text"], data["text"], tmp_path / "run", evaluate=evaluate)
    for folder, command in ((tmp_path / "run", "finetune"), (encoders["text"], "train")):
        with pytest.raises(
            ValueError, match=f"holds a run already: continue it with `d2v {command} --resume"
        ):
            claim(folder)


def test_a_line_for_each_kind_of_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """With a count and three names; later ones as they come, until there were enough lines."""
    report = Report(
        "set", 1_000, skipped={"too short": ["a", "b", "c", "d"]}, left_out={"no suffix": ["README"]}
    )
    report.unreadable = {f"{i}.wav": f"truncated: {i} bytes announced" for i in range(400)}
    said, progress = SaidOfData(report), Said()
    said.begin(progress)
    assert progress.lines == [
        "skipped 4: too short: a, b, c and 1 more",
        "left out README: no suffix",
        "warning: cannot be read, left out: 400: truncated: 0 bytes announced: 0.wav, 1.wav, 2.wav "
        "and 397 more",
    ]
    progress.lines.clear()
    said.catch_up(progress)
    assert not progress.lines
    for i in range(30):
        report.unreadable[f"later{i}.wav"] = "empty"
        said.catch_up(progress)
    assert progress.lines[0] == "warning: cannot be read, left out: later0.wav: empty"
    assert len(progress.lines) == MOST_SAID and progress.lines[-1].endswith("listed in data.json only"), (
        progress.lines
    )


class Said:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)
