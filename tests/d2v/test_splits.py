"""One division of labelled data, one list of names of parts, for pictures, speech and text."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v.config.presets import preset
from d2v.data.loader import number_classes
from d2v.data.open import check_data, open_data, open_labelled
from d2v.data.speech.transcripts import read_spoken
from d2v.data.splits import NAMES, around, divide, kind_of, parts_of
from d2v.data.text.labelled import read_labelled
from d2v.data.types import DataError, unused
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


@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, kind) for kind, names in NAMES.items() for name in names),
        *((name, "train") for name in ("Train", "TRAINING", "train-clean-100", "train2017", "trainset")),
        *((name, "valid") for name in ("val2017", "dev-other", "VALID_unseen", "devset", "eval.1")),
        *((name, "test") for name in ("test-00000-of-00002", "test_a", "Test 2", "testdata")),
        *((name, None) for name in ("trains", "valley", "developer", "testimony", "evaluate", "cat")),
    ],
)
def test_parts_are_known_by_their_names(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def parted(*files: str, stems: bool = False) -> dict[str, list[int]]:
    return {part: numbers.tolist() for part, numbers in parts_of(files, "here", stems=stems).items()}


def test_files_are_divided_by_folders_and_by_their_own_names() -> None:
    assert parted("val/a/1", "Train/a/2", "TEST/a/3", "more/4") == {"train": [1], "val": [0], "test": [2]}
    shards = ("test.tar", "train-000.tar", "train-001.tar", "val-000.tar", "val-001.tar")
    assert parted(*shards, stems=True) == {"train": [1, 2], "val": [3, 4], "test": [0]}
    assert parted("en/train.x", "fr/train.x", "en/dev.x", stems=True) == {"train": [0, 1], "dev": [2]}
    both = ("train-clean/1", "train-other/2", "test-other/3", "dev-clean/4", "test-clean/5")
    assert parted(*both) == {"train": [0, 1], "dev-clean": [3], "test-clean": [4], "test-other": [2]}
    assert parted("train/1", "train/2") == {"train": [0, 1]}
    assert parted("cat/1", "test/2", "dev/3") == {"all": [0, 1, 2]}, "classes may have such names"
    assert parted("train.jpg", "val.jpg") == parted("1", "2") == {"all": [0, 1]}
    assert parted("train/1", "2") == {"all": [0, 1]}
    with pytest.raises(DataError, match="train lies beside cat: is it a part, or a class"):
        parted("train/1", "cat/2")
    assert parted("Libri/dev-clean/1/a", "Libri/train-960/1/b") == {"train": [1], "dev-clean": [0]}
    assert parted("a/b/Train/cat/1", "a/b/Test/cat/2") == {"train": [0], "test": [1]}


def test_folders_around_all_files_are_neither_parts_nor_classes() -> None:
    assert around(["a/b/c/1", "a/b/d/2"]) == 2
    assert around(["photos/cat/1", "photos/dog/2"]) == 1
    assert around(["cat/1", "cat/2"]) == around(["1"]) == around(["a/1", "2"]) == around([]) == 0
    assert around(["Libri/train/1/2/a", "Libri/train/1/2/b"]) == 1


def test_classes_of_numbers_have_one_order() -> None:
    names = ["1", "10", "01", "2", "001", "1"]
    assert all(number_classes(some)[0] == ["001", "01", "1", "2", "10"] for some in (names, names[::-1]))


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


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
def test_every_modality_has_the_same_parts(modality: str, tmp_path: Path) -> None:
    """For probes and fine-tuning alike; pretraining takes the training part alone and says so."""
    counts = {"TRAIN": 3, "Validation": 1, "test": 2}
    for part, count in counts.items():
        if modality == "text":
            lines = [json.dumps({"text": f"{part} words {i} " * 9, "label": i % 2}) for i in range(2 * count)]
            (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
            continue
        for name in ("x", "y"):
            for i in range(count):
                MAKE[modality](tmp_path / part / name, f"{i}")
    parts = {"train": 6, "validation": 2, "test": 4}
    cfg = tiny(modality)
    found = open_labelled(str(tmp_path), cfg, run_dir=tmp_path / "run")
    assert {part: len(split) for part, split in found.splits.items()} == parts
    assert list(found.classes) == (["0", "1"] if modality == "text" else ["x", "y"])
    if modality == "audio":
        spoken = read_spoken(str(tmp_path), cfg, 16_000)
        assert {part: len(some.texts) for part, some in spoken.items()} == parts
    if modality == "text":
        assert {part: len(some) for part, some in read_labelled(str(tmp_path))[0].items()} == parts
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=1))
    note = f"of {tmp_path} the part train is read, validation, test left out"
    for report in (open_data(str(tmp_path), cfg).report, check_data(str(tmp_path), cfg)):
        assert report.total == 6 and note in report.notes
    everything = open_data(str(tmp_path), cfg, purpose="eval").report
    assert everything.total == 12 and note not in everything.notes


@pytest.mark.parametrize("modality", ["image", "audio"])
@pytest.mark.parametrize("outer", ["", "packed/as"])
def test_a_part_without_labels_is_left_out_by_name(modality: str, outer: str, tmp_path: Path) -> None:
    for part, name in (("train", "x"), ("train", "y"), ("dev", "x"), ("test", "")):
        for i in range(2):
            MAKE[modality](tmp_path / outer / part / name, f"{i}")
    found = open_labelled(str(tmp_path), tiny(modality))
    assert {part: len(split) for part, split in found.splits.items()} == {"train": 4, "dev": 2}
    assert list(found.classes) == ["x", "y"]
    left = f"left out {tmp_path}, part test: held out without labels"
    assert any(line.startswith(left) for line in unused(found.splits.values()))
    (tmp_path / outer / "train").rename(tmp_path / outer / "training of others")
    scored = open_labelled(str(tmp_path), tiny(modality), classes=["x", "y"])
    assert list(scored.splits) == ["dev"]


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
