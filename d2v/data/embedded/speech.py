"""The embedded `speech` set: 20 minutes of synthetic speech with the phone spoken at every moment.

Four flite voices; three are for training and testing, the fourth (`awb`) is never trained on. Every
utterance is a different sentence. `synthesise_speech` made the files and documents them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import soundfile

SAMPLE_RATE = 16_000
ASSETS = Path(__file__).resolve().parent.parent / "assets"
SplitName = Literal["train", "test", "unseen_voice"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


@dataclass(frozen=True)
class Utterance:
    """One sentence in one voice."""

    name: str
    """voice and number: slt/007"""
    voice: str
    text: str
    split: SplitName
    start: int
    """first sample in the voice's file"""
    samples: int
    phones: np.ndarray
    """[n] uint8: indices into `phone_names()`"""
    ends: np.ndarray
    """[n] int32: first sample after each phone, from the start of the utterance"""

    def wave(self) -> np.ndarray:
        """[samples] float32 at 16 kHz, as spoken (not normalised); the caller's own copy."""
        return _voice(self.voice)[self.start : self.start + self.samples].copy()

    def phones_at(self, samples: np.ndarray) -> np.ndarray:
        """The phone spoken at each of `samples` (positions in the utterance): int64, same shape."""
        return self.phones[np.searchsorted(self.ends, samples, side="right")].astype(np.int64)


@cache
def _labels() -> dict[str, np.ndarray]:
    with np.load(ASSETS / "speech_labels.npz") as file:
        return {name: file[name] for name in file.files}


@cache
def _voice(voice: str) -> np.ndarray:
    """All utterances of a voice end to end, decoded once per process (about a second)."""
    wave, _ = soundfile.read(ASSETS / f"speech_{voice}.ogg", dtype="float32")
    return wave


def phone_names() -> list[str]:
    """The phones of CMU's American English lexicon, alphabetical, with `pau` for silence."""
    return [str(name) for name in _labels()["phones"]]


@cache
def utterances() -> tuple[Utterance, ...]:
    """All utterances, voice by voice; the audio is decoded when a wave is first asked for."""
    table = _labels()
    voices = [str(name) for name in table["voices"]]
    spoken: dict[str, list[int]] = {voice: [] for voice in voices}
    found = []
    last = np.cumsum(table["segments"], dtype=np.int64)
    for i, number in enumerate(table["voice"]):
        voice, samples = voices[number], int(table["samples"][i])
        segments = slice(int(last[i] - table["segments"][i]), int(last[i]))
        found.append(
            Utterance(
                name=f"{voice}/{len(spoken[voice]):03d}",
                voice=voice,
                text=str(table["texts"][i]),
                split="unseen_voice" if voice == voices[-1] else "test" if table["test"][i] else "train",
                start=sum(spoken[voice]),
                samples=samples,
                phones=table["phone"][segments],
                ends=table["end"][segments],
            )
        )
        spoken[voice].append(samples)
    return tuple(found)
