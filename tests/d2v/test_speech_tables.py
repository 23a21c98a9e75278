"""Common Voice, Kaldi and NeMo as they are published, and transcripts beside sounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v.data.open import check_data, open_data
from d2v.data.speech.transcripts import read_spoken
from d2v.data.types import DataError
from tests.d2v.tiny_runs import tiny


def sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def said(root: Path) -> dict[str, dict[str, str]]:
    """part -> {file: transcript}"""
    found = read_spoken(str(root), tiny("audio"), 16_000)
    return {
        part: dict(zip([Path(name).name for name in some.utterances.names], some.texts, strict=True))
        for part, some in found.items()
    }


def common_voice(root: Path) -> None:
    rows = {"train": "abc", "dev": "d", "test": "e", "other": "f", "validated": "abcde"}
    for table, names in rows.items():
        lines = [f'{name}\tv_{name}.wav\tsaid "{name}\t2' for name in names]
        write(root / f"{table}.tsv", "client_id\tpath\tsentence\tup_votes", *lines)
    for name in "abcdef":
        sound(root / "clips" / f"v_{name}.wav")


def kaldi(root: Path) -> None:
    for part, names in {"train": "abc", "dev": "d", "test": "e"}.items():
        write(root / "data" / part / "text", *(f'u_{name} said "{name}' for name in names))
        write(root / "data" / part / "wav.scp", *(f"u_{name} ../../clips/v_{name}.wav" for name in names))
    for name in "abcdef":
        sound(root / "clips" / f"v_{name}.wav")


def nemo(root: Path) -> None:
    for part, names in {"train": "abc", "dev": "d", "test": "e"}.items():
        rows = [{"audio_filepath": f"clips/v_{x}.wav", "duration": 0.5, "text": f'said "{x}'} for x in names]
        write(root / f"{part}_manifest.json", *map(json.dumps, rows))
    for name in "abcdef":
        sound(root / "clips" / f"v_{name}.wav")


@pytest.mark.parametrize("make", [common_voice, kaldi, nemo])
def test_tables_say_the_parts_and_what_is_said(make, tmp_path: Path) -> None:
    make(tmp_path)
    found = said(tmp_path)
    parts = {"train": "abc", "dev": "d", "test": "e"}
    names = {"dev_manifest": "dev", "test_manifest": "test"}
    assert {names.get(part, part): some for part, some in found.items()} == {
        part: {f"v_{name}.wav": f'said "{name}' for name in some} for part, some in parts.items()
    }
    cfg = tiny("audio", batch=1)
    pipeline = open_data(str(tmp_path), cfg)
    assert pipeline.report.total == 3, "pretraining takes the training part"
    report = check_data(str(tmp_path), cfg)
    assert report.left_out["named in no table"] == ["clips/v_f.wav"] and not report.refused


def test_validated_clips_without_parts_are_divided(tmp_path: Path) -> None:
    common_voice(tmp_path)
    for part in ("train", "dev", "test"):
        (tmp_path / f"{part}.tsv").unlink()
    found = said(tmp_path)
    assert {part: len(some) for part, some in found.items()} == {"train": 4, "test": 1}


def test_files_that_a_table_names_and_that_are_not_there_are_named(tmp_path: Path) -> None:
    common_voice(tmp_path)
    (tmp_path / "clips" / "v_b.wav").unlink()
    report = read_spoken(str(tmp_path), tiny("audio"), 16_000)["train"].report
    assert report.unreadable == {"clips/v_b.wav": "does not exist"}


@pytest.mark.parametrize(
    "make, file, line, match",
    [
        (kaldi, "data/train/wav.scp", "u_x sox x.wav -t wav - |", "a command, which is not run"),
        (kaldi, "data/train/segments", "u_a v_a 0 1", "parts of recordings are not read"),
        (
            nemo,
            "train_manifest.json",
            '{"audio_filepath": "a", "offset": 2.0}',
            "line 4: parts of recordings",
        ),
        (nemo, "train_manifest.json", "[[", "line 4: not an object with audio_filepath"),
        (nemo, "train_manifest.json", '{"audio_filepath": 1}', "line 4: audio_filepath and text must be"),
        (
            nemo,
            "train_manifest.json",
            '{"audio_filepath": "clips/v_a.wav", "text": "b"}',
            "a second transcript",
        ),
        (
            nemo,
            "train_manifest.json",
            '{"audio_filepath": "clips/v_d.wav", "text": "b"}',
            "and in another part",
        ),
        (common_voice, "train.tsv", "one column", "line 5: 1 columns, 3 are needed"),
    ],
)
def test_rows_that_are_no_whole_files_are_refused(
    make, file: str, line: str, match: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with (tmp_path / file).open("a") as opened:
        opened.write(f"{line}\n")
    for read in (said, lambda root: open_data(str(root), tiny("audio"))):
        with pytest.raises(DataError, match=match):
            read(tmp_path)


def test_transcripts_beside_sounds(tmp_path: Path) -> None:
    texts = {"a.txt": "one (two)", "b.lab": "three", "c.trn": "four five (spk-1_c.3)", "d.e.txt": "six"}
    for name, text in texts.items():
        write(tmp_path / name, text)
        sound(tmp_path / f"{name.rpartition('.')[0]}.wav")
    found = said(tmp_path)
    assert dict(sorted({**found["train"], **found["test"]}.items())) == {
        "a.wav": "one (two)", "b.wav": "three", "c.wav": "four five", "d.e.wav": "six",
    }  # fmt: skip
