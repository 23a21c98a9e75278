"""The scripts that make labelled toy data, and the table of what pretraining is worth on them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import downstream, glosses, spoken_digits
from tests.d2v.tiny_runs import make_data

NOUNS = """  1 This software and database is being provided to you
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived
00030358 04 n 02 act 0 deed 0 010 @ 00029378 n 0000 | something that people do; "a good act"; "two"
01317541 05 n 01 animal 0 001 @ 00015388 n 0000 | a living organism; characterized by movement
15113229 28 n 01 period 0 001 @ 00033615 n 0000 | an amount of time
"""


def test_glosses_are_definitions_by_supersense(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(NOUNS)
    assert list(glosses.glosses(tmp_path)) == [
        ("something that people do", "act"),
        ("a living organism; characterized by movement", "animal"),
        ("an amount of time", "time"),
    ]
    (tmp_path / "data.noun").write_text(NOUNS * 20)
    assert glosses.write(tmp_path, tmp_path / "out") == {"train": 54, "test": 6}
    rows = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(set(row) == {"text", "label"} for row in rows)
    assert len(glosses.SUPERSENSES) == 25


def test_spoken_digits_keep_their_unseen_voice(tmp_path: Path) -> None:
    jobs = spoken_digits.jobs(tmp_path)
    assert jobs == spoken_digits.jobs(tmp_path)
    parts = {
        part: [job for job in jobs if job[0].parts[-3] == part] for part in ("train", "test", "test_unseen")
    }
    assert {name: len(some) for name, some in parts.items()} == {
        "train": 900,
        "test": 120,
        "test_unseen": 200,
    }
    assert {job[2] for job in parts["test_unseen"]}.isdisjoint(
        {job[2] for job in parts["train"] + parts["test"]}
    )
    assert all(
        4 <= len(job[1].split()) <= 6 and set(job[1].split()) <= set(spoken_digits.WORDS) for job in jobs
    )
    assert len({job[0] for job in jobs}) == len(jobs)


def test_speaking_writes_sound_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("flite") is None:  # then what it would be asked
        asked: list[list[str]] = []
        monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
        spoken_digits.speak(tmp_path / "a" / "0.wav", "one two", "slt", 1.1, 180.0)
        assert asked[0][:3] == ["flite", "-voice", "slt"] and asked[0][-1] == str(tmp_path / "a" / "0.wav")
    else:
        import soundfile

        spoken_digits.speak(tmp_path / "a" / "0.wav", "one two", "slt", 1.1, 180.0)
        wave, rate = soundfile.read(tmp_path / "a" / "0.wav")
        assert rate == 16_000 and 0.5 < len(wave) / rate < 3 and np.abs(wave).max() > 0.05
    assert (tmp_path / "a" / "0.txt").read_text() == "one two\n"


def test_downstream_runs_what_it_says_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "said"
    for part in ("train", "test", "test_unseen"):
        make_data("audio", data / part)
        for number, file in enumerate(sorted((data / part).glob("*.wav"))):
            file.with_suffix(".txt").write_text("ab" if number % 2 else "ba")
    spoken = next(task for task in downstream.TASKS if task.name == "spoken")
    task = downstream.Task(
        "spoken", "letters", "audio_tiny", ("--data", "{data}", "--data.batch", "4"),
        (*spoken.tuning[:-2], "--data.batch", "4"), (1, 2), spoken.scores,
    )  # fmt: skip
    first = downstream.run(task, str(data), tmp_path / "work", 2)
    capsys.readouterr()
    assert downstream.run(task, str(data), tmp_path / "work", 2) == first
    assert "step 1/" not in capsys.readouterr().out  # nothing was trained again
    assert [(one["start"], one["seed"]) for one in first["runs"]] == [
        ("pretrained", 1), ("scratch", 1), ("pretrained", 2), ("scratch", 2),
    ]  # fmt: skip
    assert all("--scratch" in one["command"] for one in first["runs"] if one["start"] == "scratch")
    rows = downstream.downstream_rows({"tasks": [first]})
    assert [row[1] for row in rows[1:]] == ["WER, %", "WER of an unseen voice, %"]
    assert all("±" in cell for row in rows[1:] for cell in row[2:4])


def made(scores: list[float]) -> dict[str, Any]:
    runs = [{"start": start, "seed": i, "scores": {"a/b": x}, "seconds": 2.0 * i, "command": "c"}
            for i, x in enumerate(scores) for start in ("pretrained", "scratch")]  # fmt: skip
    return {"says": "s", "names": {"a/b": "n"}, "runs": runs, "pretraining": {"command": "p", "seconds": 9.6}}


def test_downstream_rows_are_means_and_deviations() -> None:
    assert downstream.downstream_rows({"tasks": [made([0.1, 0.3]), made([0.5])]})[1:] == [
        ["s", "n", "20.0 ± 14.1", "20.0 ± 14.1", "10", "1"],
        ["s", "n", "50.0", "50.0", "10", "0"],
    ]
