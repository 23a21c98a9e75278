"""Common Voice, Kaldi and NeMo as they are published, and transcripts beside sounds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from d2v.config.run import Channels
from d2v.data.open import check_data, open_data
from d2v.data.speech.files import list_audio
from d2v.data.speech.pipeline import read_index
from d2v.data.speech.reading import read_header, read_wave, resample
from d2v.data.speech.transcripts import read_spoken
from d2v.data.types import DataError, Report
from tests.d2v.tiny_runs import tiny


def sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def said(root: Path) -> dict[str, dict[str, str]]:
    """part -> {file: transcript}"""
    cfg = tiny("audio")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, max_seconds=10.0))
    found = read_spoken(str(root), cfg, 16_000)
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
        (kaldi, "data/train/segments", "u_a v_a 0 1", "line 1: must be utterance, recording of wav.scp"),
        (nemo, "train_manifest.json", '{"audio_filepath": "a", "offset": "x"}', "line 4: not an object with"),
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
def test_damaged_tables_are_refused(make, file: str, line: str, match: str, tmp_path: Path) -> None:
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


def segments(root: Path, suffix: str) -> dict[str, tuple[int, int]]:
    """Kaldi's, of two stereo recordings at 8 kHz; -> frames of each utterance."""
    noise = np.random.default_rng(1)
    for name in "xy":
        (root / "wav").mkdir(exist_ok=True)
        soundfile.write(root / "wav" / f"{name}.{suffix}", 0.1 * noise.standard_normal((24_000, 2)), 8_000)
    write(root / "all" / "wav.scp", *(f"rec-{name} wav/{name}.{suffix}" for name in "xy"))
    write(root / "all" / "segments", "u1 rec-x 0.5 1.25", "u2 rec-x 1.25 -1", "u3 rec-y 0 3.05")
    return {"x:u1": (4_000, 10_000), "x:u2": (10_000, 24_000), "y:u3": (0, 24_000)}


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("channels", ["mix", "first"])
def test_pieces_are_what_their_recordings_hold_there(suffix: str, channels: Channels, tmp_path: Path) -> None:
    """Without transcripts a data set for pretraining; every piece is resampled alone."""
    places = segments(tmp_path, suffix)
    cfg = tiny("audio")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, channels=channels))
    listing = list_audio(tmp_path, report := Report(str(tmp_path), 0), cfg.data)
    found = read_index(listing, 16_000, channels, report)
    assert not report.unreadable and len(found) == 3
    for index, (name, (first, last)) in enumerate(places.items()):
        path = tmp_path / "wav" / f"{name[0]}.{suffix}"
        assert found.names[index] == f"wav/{name[0]}.{suffix}{name[1:]}"
        whole = read_wave(path, read_header(path), 8_000, channels)
        wave = found.wave(index, channels)
        assert np.array_equal(wave, resample(whole[first:last], 8_000, 16_000))
        assert len(wave) == found.lengths[index] == 2 * (last - first)


@pytest.mark.parametrize("between", [" ", "\t"])
def test_pieces_have_transcripts_and_bounds(between: str, tmp_path: Path) -> None:
    segments(tmp_path, "wav")
    listed = tmp_path / "all" / "wav.scp"
    listed.write_text(listed.read_text().replace(" ", between))
    write(tmp_path / "all" / "text", "u1 one", "u2 two", "u3 three", "u4 four", "u5 five", "u6")
    with (tmp_path / "all" / "segments").open("a") as file:
        file.write("u4 rec-y 2 3.5\nu5 rec-y 2 2\nu6 rec-y 0 1\n")
    found = said(tmp_path)
    assert sorted(sum((list(some.values()) for some in found.values()), [])) == ["one", "three", "two"]
    cfg = tiny("audio")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=1))
    assert check_data(str(tmp_path), cfg).unreadable == {
        "wav/y.wav:u4": "2 to 3.5 s is no piece of a recording of 3 s",
        "wav/y.wav:u5": "2 to 2 s is no piece of a recording of 3 s",
    }


def test_check_counts_transcripts_and_names_those_too_long_to_train_on(tmp_path: Path) -> None:
    for i, text in enumerate(("short", "a" * 30, "", "ab " * 400)):
        sound(tmp_path / "train" / f"{i}.wav")
        write(tmp_path / "train" / f"{i}.txt", text)
    cfg = tiny("audio")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=1))
    report = check_data(str(tmp_path), cfg)
    assert report.facts["transcripts"] == {"train": 3} and not report.refused
    long = "of train 2 transcripts are longer than their frames, which fine-tuning leaves out"
    assert f"{long}: train/1.wav, train/3.wav" in report.notes
    (tmp_path / "train" / "0.txt").write_bytes(b"\xff")
    assert any("0.txt: not UTF-8" in note for note in check_data(str(tmp_path), cfg).notes)


def test_nemo_names_pieces_by_offset_and_duration(tmp_path: Path) -> None:
    segments(tmp_path, "wav")
    (tmp_path / "all" / "wav.scp").unlink()
    rows = [{"offset": 0, "duration": 0.5, "text": "a"}, {"offset": 0.5, "duration": 1, "text": "b"},
            {"offset": 1.5, "text": "c"}, {"duration": 3, "text": "whole"}]  # fmt: skip
    rows = [{"audio_filepath": f"wav/{'xy'[i // 3]}.wav", **row} for i, row in enumerate(rows)]
    write(tmp_path / "manifest.json", *map(json.dumps, rows))
    texts = sum((list(some.items()) for some in said(tmp_path).values()), [])
    assert dict(texts) == {"x.wav:0-0.5": "a", "x.wav:0.5-1.5": "b", "x.wav:1.5-": "c", "y.wav": "whole"}
