"""Tables that say what pictures and sounds are: classes, parts, transcripts; the same for both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v.data.open import check_data, open_data, open_labelled
from d2v.data.speech.transcripts import read_spoken
from d2v.data.types import DataError, Labelled, unused
from tests.d2v.tiny_runs import tiny

SUFFIX = {"image": ".png", "audio": ".wav"}


def sample(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12), np.uint8)).save(path)
    else:
        soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def esc(root: Path, suffix: str) -> None:
    """ESC-50's form: a table in a folder of its own; fold is no part."""
    names = [f"1-{i}-A-{i % 2}{suffix}" for i in range(10)]
    rows = [f"{name},{i % 5 + 1},{i % 2},{('dog', 'rain, hail')[i % 2]!r}" for i, name in enumerate(names)]
    write(root / "meta" / "esc50.csv", "filename,fold,target,category", *(r.replace("'", '"') for r in rows))
    for name in names:
        sample(root / "audio" / name)


def competition(root: Path, suffix: str) -> None:
    """Names without suffixes, a part in a column, tabs."""
    rows = [f"x{i}\t{('train', 'Val')[i > 7]}\t{('dog', 'rain, hail')[i % 2]}" for i in range(10)]
    write(root / "labels.tsv", "\ufefffile\tsplit\tlabel", *rows)
    for i in range(10):
        sample(root / "all" / f"x{i}{suffix}")


def folders(root: Path, suffix: str) -> None:
    """Hugging Face's form: a metadata file in the folder of each part."""
    for part, count in (("train", 8), ("test", 2)):
        names = [f"{part}{i}{suffix}" for i in range(count)]
        rows = [{"file_name": x, "label": ("dog", "rain, hail")[i % 2]} for i, x in enumerate(names)]
        write(root / part / "metadata.jsonl", *map(json.dumps, rows))
        for name in names:
            sample(root / part / name)


def classes_in(found: Labelled) -> Mapping[str, list[str]]:
    return {
        part: [found.classes[int(label)] for _, _, labels in split.batches(3) for label in labels]
        for part, split in found.splits.items()
    }


@pytest.mark.parametrize("modality", ["image", "audio"])
@pytest.mark.parametrize(
    "make, parts",
    [
        (esc, {"train": 8, "test": 2}),
        (competition, {"train": 8, "val": 2}),
        (folders, {"train": 8, "test": 2}),
    ],
)
def test_tables_name_classes_and_parts(
    make: Callable[[Path, str], None], parts: dict[str, int], modality: str, tmp_path: Path
) -> None:
    make(tmp_path, SUFFIX[modality])
    found = open_labelled(str(tmp_path), tiny(modality))
    assert list(found.classes) == ["dog", "rain, hail"]
    for part, names in classes_in(found).items():
        assert sorted(names) == ["dog"] * (parts[part] // 2) + ["rain, hail"] * (parts[part] // 2)
    cfg = tiny(modality)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=1))
    report = open_data(str(tmp_path), cfg).report
    assert report.total == (10 if make is esc else 8), "pretraining reads the training part"


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_what_a_table_does_not_know_is_named(modality: str, tmp_path: Path) -> None:
    suffix, cfg = SUFFIX[modality], tiny(modality)
    for i in range(6):
        sample(tmp_path / f"{i}{suffix}")
    rows = [f"{i}{suffix},{'ab'[i % 2]},{'xy'[i // 3]}" for i in range(5)]
    write(tmp_path / "t.csv", "file_name,category,room", *rows, f"gone{suffix},a,x", f"5{suffix},,x")
    found = open_labelled(str(tmp_path), cfg)
    lines = "\n".join(unused(found.splits.values()))
    assert f"gone{suffix}: named in a table but not there" in lines
    assert f"5{suffix}: no table says what it is" in lines
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, label_column="room"))
    assert list(open_labelled(str(tmp_path), cfg).classes) == ["x", "y"]
    write(tmp_path / "t.csv", "file_name,label", f"0{suffix},a", f"0{suffix},b")
    with pytest.raises(DataError, match=rf"t\.csv, line 3: a second label of 0\{suffix}"):
        open_labelled(str(tmp_path), tiny(modality))
    write(tmp_path / "t.csv", "file_name,label", f"0{suffix},a,b")
    assert "line 2: not a row" in check_data(str(tmp_path), tiny(modality)).refused


def test_folders_are_classes_unless_a_column_is_asked_for(tmp_path: Path) -> None:
    for i in range(10):
        sample(tmp_path / "ab"[i % 2] / f"{i}.png")
    write(tmp_path / "t.csv", "file_name,label,colour", *(f"{i}.png,{i},{'rg'[i // 5]}" for i in range(10)))
    cfg = tiny("image")
    assert list(open_labelled(str(tmp_path), cfg).classes) == ["a", "b"]
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, label_column="colour"))
    assert list(open_labelled(str(tmp_path), cfg).classes) == ["g", "r"]


def said(root: Path, **data: str) -> dict[str, list[str]]:
    cfg = tiny("audio")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data))
    return {part: some.texts for part, some in read_spoken(str(root), cfg, 16_000).items()}


def test_ljspeech(tmp_path: Path) -> None:
    for i in range(5):
        sample(tmp_path / "wavs" / f"LJ001-{i:04}.wav")
    rows = [f'LJ001-{i:04}|No. {i}, "so"|Number {i}, "so' for i in range(5)]
    write(tmp_path / "metadata.csv", *rows)
    assert sorted(sum(said(tmp_path).values(), [])) == [f'Number {i}, "so' for i in range(5)]
    write(tmp_path / "metadata.csv", *(row.rpartition("|")[0] for row in rows))
    assert said(tmp_path)["test"][0].startswith("No. ")


@pytest.mark.parametrize("header", ["file_name,text", "file_name,text,transcription"])
def test_a_header_of_ljspeechs_columns_is_a_header(header: str, tmp_path: Path) -> None:
    for i in range(5):
        sample(tmp_path / f"{i}.wav")
    columns = header.count(",")
    write(tmp_path / "metadata.csv", header, *(f"{i}.wav" + f",a{i}" * columns for i in range(5)))
    assert sorted(sum(said(tmp_path).values(), [])) == [f"a{i}" for i in range(5)]


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_rows_of_no_part_are_left_out_by_name(modality: str, tmp_path: Path) -> None:
    """An empty part, and one of another name."""
    suffix = SUFFIX[modality]
    for i in range(8):
        sample(tmp_path / f"{i}{suffix}")
    parts = ["train", "train", "train", "train", "test", "test", "", "extra"]
    write(
        tmp_path / "t.csv", "file,label,split", *(f"{i}{suffix},{'ab'[i % 2]},{parts[i]}" for i in range(8))
    )
    found = open_labelled(str(tmp_path), tiny(modality))
    assert {part: len(split) for part, split in found.splits.items()} == {"train": 4, "test": 2}
    assert any(f"in no part: 6{suffix}, 7{suffix}" in line for line in unused(found.splits.values()))


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    for i in range(5):
        sample(tmp_path / f"{i}.wav")
    write(tmp_path / "t.csv", "clip,wrd,raw", *(f"{i}.wav,w{i},r{i}" for i in range(5)))
    assert sorted(sum(said(tmp_path, audio_column="clip").values(), [])) == [f"w{i}" for i in range(5)]
    found = said(tmp_path, audio_column="clip", text_column="raw")
    assert sorted(sum(found.values(), [])) == [f"r{i}" for i in range(5)]


def test_timit(tmp_path: Path) -> None:
    """Capitals, and the samples before the words."""
    for part in ("TRAIN", "TEST"):
        for name in ("SA1", "SX2"):
            sample(tmp_path / part / "DR1" / "FCJF0" / f"{name}.wav")
            for suffix, line in (("TXT", "0 46797 She had."), ("PHN", "0 3050 h#"), ("WRD", "3050 5723 she")):
                write(tmp_path / part / "DR1" / "FCJF0" / f"{name}.{suffix}", line)
    assert said(tmp_path) == {"train": ["She had."] * 2, "test": ["She had."] * 2}


@pytest.mark.parametrize("outer", ["", "speech_commands_v0.02"])
def test_lists_of_speech_commands(outer: str, tmp_path: Path) -> None:
    for name in ("yes", "no"):
        for i in range(4):
            sample(tmp_path / outer / name / f"{i}.wav")
    write(tmp_path / outer / "validation_list.txt", "yes/0.wav", "no/0.wav")
    write(tmp_path / outer / "testing_list.txt", "yes/1.wav")
    found = classes_in(open_labelled(str(tmp_path), tiny("audio")))
    assert found == {"train": ["no"] * 3 + ["yes"] * 2, "validation": ["no", "yes"], "testing": ["yes"]}
