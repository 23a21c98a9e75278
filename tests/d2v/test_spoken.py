"""Transcripts as people write them: scripts with combining marks, and texts that no alignment can hold."""

from __future__ import annotations

import csv
import importlib.util
import json
import unicodedata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from d2v.config.presets import preset
from d2v.config.recipes import RECIPES, recipe
from d2v.config.tune import FineTuneConfig
from d2v.data.speech import letters
from d2v.data.speech.transcripts import Vocabulary, read_parts
from d2v.data.tune import open_tune_data
from d2v.data.types import DataError


def _copied() -> ModuleType:
    """The file alone, as a folder for transformers has it."""
    spec = importlib.util.spec_from_file_location("copied_letters", letters.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("module", [letters, _copied()], ids=["ours", "copied"])
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("हिन्दी, में!", "हिन्दी में"),
        ("ที่นี่ น้ำ", "ที่นี่ น้ำ"),
        ("שָׁלוֹם.", "שָׁלוֹם"),
        ("cafe\u0301, nai\u0308ve", "CAFÉ NAÏVE"),
        ("Don\u2019t stop-it", "DON'T STOP IT"),
        ("heart \u2764\ufe0f \u0301 co\u00adop", "HEART COOP"),
        ("\u0390", "\u03aa\u0301"),
    ],
)
def test_combining_marks_stay_in_their_words(module: ModuleType, text: str, kept: str) -> None:
    wanted = unicodedata.normalize("NFC", kept)
    for form in ("NFC", "NFD"):
        written = unicodedata.normalize(form, text)
        assert module.normalise(written) == wanted
        assert module.spell(written, set(wanted)) == wanted


def test_a_vocabulary_may_have_marks_apart() -> None:
    vocabulary = Vocabulary((*letters.SPECIALS, "|", "e", "\u0301"))
    assert vocabulary.decode(vocabulary.encode("\u00c9").tolist()) == "e\u0301"
    counted = Vocabulary.of(["हिन्दी"])
    assert "<unk>" not in [counted.letters[i] for i in counted.encode("हिन्दी").tolist()]


def _corpus(root: Path, texts: dict[str, str]) -> FineTuneConfig:
    """A second of noise for each name, 49 frames."""
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        wave = np.random.default_rng(0).normal(0, 0.1, 16_000)
        soundfile.write(root / f"{name}.wav", wave, 16_000)
        (root / f"{name}.txt").write_text(text)
    name = next(name for name in RECIPES if recipe(name).head.task == "ctc")
    return recipe(name).on(name, preset("audio_base").model)


def test_transcripts_longer_than_their_frames_are_left_out_of_training(tmp_path: Path) -> None:
    long, repeated = "ab" * 30, "a" * 25
    cfg = _corpus(
        tmp_path / "data",
        {
            "train/talk0.1": "well",
            "train/talk0": "ab" * 20,
            "train/empty": " ,",
            "train/long": long,
            "train/repeated": repeated,
            "dev/long": long,
        },
    )
    (tmp_path / "run").mkdir()
    data = open_tune_data(
        str(tmp_path / "data"),
        cfg,
        device=torch.device("cpu"),
        encoder_dir=None,
        run_dir=tmp_path / "run",
    )
    assert data.loader.report.skipped == {
        "no transcript": ["train/empty.wav"],
        "transcript is longer than its frames": ["train/long.wav", "train/repeated.wav"],
    }
    assert [len(row) for row in data.labels(torch.arange(2))] == [len("well|"), 41]
    assert len(data.parts["dev"]) == 1
    for name in ("talk0", "talk0.1"):
        (tmp_path / "data" / "train" / f"{name}.txt").write_text(long)
    with pytest.raises(DataError, match=r"no utterance can be trained on: .*longer than its frames"):
        open_tune_data(
            str(tmp_path / "data"),
            cfg,
            device=torch.device("cpu"),
            encoder_dir=None,
            run_dir=tmp_path / "run",
        )


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_metadata_of_an_audiofolder(suffix: str, tmp_path: Path) -> None:
    cfg = preset("audio_base")
    _corpus(tmp_path, {"train/a": "", "train/b": "", "dev/c": "from beside"})
    table = tmp_path / "train" / f"metadata.{suffix}"
    rows = [("a.wav", 'says, "well"'), ("gone.wav", "x")]

    def write() -> None:
        if suffix == "csv":
            with table.open("w", newline="") as file:
                csv.writer(file).writerows([("file_name", "transcription"), *rows])
        else:
            lines = (json.dumps({"file_name": name, "transcription": text}) for name, text in rows)
            table.write_text("\n".join(lines))

    write()
    found = read_parts(str(tmp_path), cfg, 16_000)
    assert {part: some.texts for part, some in found.items()} == {
        "train": ['says, "well"'],
        "dev": ["from beside"],
    }
    report = found["train"].report
    assert report.left_out == {"named in a table but not there": ["train/gone.wav"]}
    assert report.skipped == {"no transcript": ["train/b.wav"]}
    rows.append(("a.wav", "something else"))
    write()
    with pytest.raises(DataError, match=r"a second transcription of a\.wav"):
        read_parts(str(tmp_path), cfg, 16_000)
    table.write_text("no_name\n1\n" if suffix == "csv" else "{")
    with pytest.raises(DataError, match=f"metadata.{suffix}: "):
        read_parts(str(tmp_path), cfg, 16_000)
