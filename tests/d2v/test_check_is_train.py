"""`d2v check` ends with 1 exactly where training would refuse a data set, and says the same.

`BAD` grows with every report of a set that one accepts and the other does not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v.cli import show
from d2v.cli.main import main
from d2v.config.run import Config
from d2v.data.open import open_data
from d2v.data.types import DataError, Position
from tests.d2v.tiny_runs import LINES, tiny


def pictures(root: Path, count: int, part: str = "") -> None:
    (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (24, 24), np.uint8)
        Image.fromarray(pixels).save(root / part / f"{i}.png")


def sounds(root: Path, count: int, part: str = "", seconds: float = 1.0) -> None:
    (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise = 0.1 * np.random.default_rng(i).standard_normal(int(16_000 * seconds))
        soundfile.write(root / part / f"{i}.wav", noise, 16_000)


def texts(root: Path, count: int, part: str = "") -> None:
    (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (root / part / f"{i}.txt").write_text(" ".join(LINES) * 20 + str(i))


MAKE = {"image": pictures, "audio": sounds, "text": texts}
SUFFIX = {"image": ".png", "audio": ".wav", "text": ".jsonl"}


def good(root: Path, modality: str) -> None:
    MAKE[modality](root, 16)


def empty(root: Path, modality: str) -> None:
    root.mkdir()


def foreign(root: Path, modality: str) -> None:
    root.mkdir()
    (root / "notes.docx").write_bytes(b"x")


def too_few(root: Path, modality: str) -> None:
    MAKE[modality](root, 1)
    for file in root.glob("*.txt"):
        file.write_text("rain")


def too_few_for_training(root: Path, modality: str) -> None:
    MAKE[modality](root, 16, "val")
    too_few(root / "train", modality)


def with_parts(root: Path, modality: str) -> None:
    MAKE[modality](root, 16, "train")
    (root / "test").mkdir()
    (root / "test" / f"broken{SUFFIX[modality]}").write_bytes(b"\xff broken")


def held_out_alone(root: Path, modality: str) -> None:
    MAKE[modality](root, 16, "test")


def train_beside_a_class(root: Path, modality: str) -> None:
    MAKE[modality](root, 8, "train")
    MAKE[modality](root, 8, "cats")


def one_broken(root: Path, modality: str) -> None:
    good(root, modality)
    (root / f"broken{SUFFIX[modality]}").write_bytes(b"\xff broken\n")


def many_broken(root: Path, modality: str) -> None:
    good(root, modality)
    if modality == "text":
        (root / "broken.jsonl").write_bytes(b"\xff broken\n" * 40)
    for i in range(40):
        (root / f"broken{i}{SUFFIX[modality]}").write_bytes(b"\xff broken\n")


def all_too_short(root: Path, modality: str) -> None:
    if modality != "audio":
        pytest.skip("lengths are of sounds")
    sounds(root, 8, seconds=0.1)


def shorter_than_a_batch(root: Path, modality: str) -> None:
    if modality != "audio":
        pytest.skip("lengths are of sounds")
    sounds(root, 3)


def a_json_line_for_each(root: Path, modality: str) -> None:
    if modality != "text":
        pytest.skip("of texts")
    root.mkdir()
    lines = [json.dumps({"text": " ".join(LINES) * 20}), json.dumps({"other": 1})]
    (root / "train.jsonl").write_text("\n".join(lines * 8))


BAD: dict[Callable[[Path, str], None], bool] = {
    good: True,
    empty: False,
    foreign: False,
    too_few: False,
    too_few_for_training: False,
    with_parts: True,
    held_out_alone: False,
    train_beside_a_class: False,
    one_broken: True,
    many_broken: False,
    all_too_short: False,
    shorter_than_a_batch: False,
    a_json_line_for_each: True,
}
"""how a set is made -> whether it can be trained on"""


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_check_refuses_what_training_refuses(
    make: Callable[[Path, str], None],
    modality: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, cfg = tmp_path / "set", tiny(modality)
    make(root, modality)
    assert bool(refusal(root, cfg)) != BAD[make]
    monkeypatch.setattr(show, "preset", lambda name: cfg)
    assert main(["check", "--data", str(root), "--preset", "tiny", "--json"]) == int(not BAD[make])
    assert (
        json.loads(capsys.readouterr().out)["refused"].split(" of ")[-1].splitlines()[:1]
        == (
            refusal(root, cfg).split(" of ")[-1].splitlines()[:1]  # training stops before it has counted all
        )
    )


def test_without_a_preset_the_size_of_a_batch_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "pictures", 3)
    sounds(tmp_path / "sounds", 3, seconds=3)
    for name, base, batch in (("pictures", "image_base", "3 samples"), ("sounds", "audio_base", "9.0 s")):
        assert main(["check", "--data", str(tmp_path / name)]) == 0
        assert main(["check", "--data", str(tmp_path / name), "--preset", base]) == 1
        assert f"training would stop: data: {tmp_path / name}: {batch}" in capsys.readouterr().out


def refusal(root: Path, cfg: Config) -> str:
    """Why training stops within its first two epochs."""
    try:
        pipeline = open_data(
            str(root), dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, workers=0))
        )
        for _ in pipeline.micro_batches(Position(), 4):
            if pipeline.position.epoch == 2:
                return ""
    except DataError as error:
        return str(error)
    raise AssertionError("a stream without an end has ended")
