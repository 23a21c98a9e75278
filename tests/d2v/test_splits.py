"""One division of labelled data, one list of names of parts, for pictures, speech and text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v.config.presets import preset
from d2v.data.open import open_labelled
from d2v.data.speech.transcripts import read_spoken
from d2v.data.splits import HELD_OUT, TRAIN, divide, named_parts
from d2v.data.text.labelled import read_labelled
from d2v.data.types import DataError
from tests.d2v.tiny_runs import tiny

CLASSES = ["a"] * 10 + ["b"] * 4 + ["c"]


def test_a_fifth_of_every_class_is_held_out_and_a_class_of_one_is_for_training():
    parts = divide(CLASSES)
    assert Counter(CLASSES[i] for i in parts["test"]) == {"a": 2, "b": 1}
    assert sorted([*parts["train"], *parts["test"]]) == list(range(15))
    assert all((np.diff(some) > 0).all() for some in parts.values())
    assert all(np.array_equal(divide(CLASSES)[part], some) for part, some in parts.items())
    assert len(divide([""] * 100)["test"]) == 20
    assert list(divide([0])["test"]) == [] and list(divide([])["train"]) == []


def test_parts_are_known_by_their_names_in_any_case():
    assert named_parts(["test", "Train", "DEV"]) == ("Train", "DEV")
    assert named_parts(["training", "holdout"]) == ("training", "holdout")
    assert named_parts(["train", "other"]) is named_parts(["test", "val"]) is named_parts([]) is None


def make_pictures(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12), np.uint8)).save(
        folder / f"{name}.png"
    )


def make_speech(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / f"{name}.wav", 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)
    (folder / f"{name}.txt").write_text("AB")


MAKE = {"image": make_pictures, "audio": make_speech}


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("held", HELD_OUT)
@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_every_modality_knows_every_name(modality: str, held: str, train: str, tmp_path: Path) -> None:
    if modality == "text":
        for part, count in ((train.upper(), 6), (held, 2)):
            lines = [json.dumps({"text": f"some words {i}", "label": i % 2}) for i in range(count)]
            (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
        parts, _ = read_labelled(str(tmp_path))
        assert {part: len(found) for part, found in parts.items()} == {"train": 6, "test": 2}
        return
    for part, count in ((train.upper(), 3), (held, 1)):
        for name in ("x", "y"):
            for i in range(count):
                MAKE[modality](tmp_path / part / name, f"{i}")
    found = open_labelled(str(tmp_path), tiny(modality))
    assert {part: len(split) for part, split in found.splits.items()} == {"train": 6, "test": 2}
    assert list(found.classes) == ["x", "y"]
    if modality == "audio":
        spoken = read_spoken(str(tmp_path), tiny("audio"), 16_000)
        assert {part: len(some.texts) for part, some in spoken.items()} == {"train": 6, held: 2}


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_without_parts_every_modality_is_divided_alike(modality: str, tmp_path: Path) -> None:
    if modality == "text":
        lines = [json.dumps({"text": f"some words {i}", "label": name}) for i, name in enumerate(CLASSES)]
        (tmp_path / "all.jsonl").write_text("\n".join(lines))
        parts, _ = read_labelled(str(tmp_path / "all.jsonl"))
        assert Counter(sentence.label for sentence in parts["test"]) == {"a": 2, "b": 1}
        return
    for i, name in enumerate(CLASSES):
        MAKE[modality](tmp_path / name, f"{i:02}")
    found = open_labelled(str(tmp_path), tiny(modality))
    labels = [int(label) for _, _, some in found.splits["test"].batches(4) for label in some]
    assert Counter(found.classes[label] for label in labels) == {"a": 2, "b": 1}


def test_texts_of_one_stem_in_several_folders_are_all_read(tmp_path: Path) -> None:
    for language in ("en", "fr"):
        (tmp_path / language).mkdir()
        for part, count in (("train", 3), ("test", 1)):
            lines = [json.dumps({"text": f"{language} {i}", "label": i % 2}) for i in range(count)]
            (tmp_path / language / f"{part}.jsonl").write_text("\n".join(lines))
    parts, report = read_labelled(str(tmp_path))
    assert {part: len(some) for part, some in parts.items()} == {"train": 6, "test": 2} and report.total == 8
    found = open_labelled(str(tmp_path), preset("text_tiny"), run_dir=tmp_path / "run")
    assert len(found.splits["train"]) == 6


def test_numbers_as_labels_are_divided_as_one_class(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "some words", "label": i / 7}) for i in range(10)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    parts, _ = read_labelled(str(tmp_path / "all.jsonl"), numbers=True)
    assert len(parts["test"]) == 2
    with pytest.raises(DataError, match="part test holds no sample"):
        read_labelled(str(tmp_path / "all.jsonl"))


def test_one_rule_for_labels(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"text": "x", "label": true}\n')
    for read in (read_labelled, lambda path: open_labelled(path, preset("text_tiny"))):
        with pytest.raises(DataError, match=r'all.jsonl:1 has no "label" that is a string or a number'):
            read(str(tmp_path / "all.jsonl"))
