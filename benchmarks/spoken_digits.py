"""Spoken digits with transcripts, synthesised: three voices to train on, and one that training never hears.

    python -m benchmarks.spoken_digits spoken/        needs the program flite (Debian: apt install flite)
    d2v finetune RUN --task ctc --data spoken/ --out runs/digits

Every utterance is four to six digits, spoken faster or slower and higher or lower by chance. `train` and
`test` share voices, `test_unseen` is the held-out one. The same on any machine with the same flite.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = {"slt": 180.0, "rms": 105.0, "kal16": 105.0}
"""voice -> mean pitch, Hz"""
UNSEEN = ("awb", 120.0)
COUNTS = {"train": 300, "test": 40}
"""utterances of each voice"""
UNSEEN_COUNT = 200


def jobs(out: Path) -> list[tuple[Path, str, str, float, float]]:
    """(wav file, text, voice, stretch of durations, pitch) of every utterance."""
    rng = np.random.Generator(np.random.PCG64(0))
    found = []
    parts = [(part, voice, pitch, count) for part, count in COUNTS.items() for voice, pitch in VOICES.items()]
    for part, voice, pitch, count in [*parts, ("test_unseen", *UNSEEN, UNSEEN_COUNT)]:
        for number in range(count):
            text = " ".join(WORDS[i] for i in rng.integers(0, 10, rng.integers(4, 7)))
            stretch, shift = rng.uniform(0.85, 1.2), rng.uniform(0.9, 1.1)
            file = out / part / voice / f"{number:03d}.wav"
            found.append((file, text, voice, float(stretch), float(pitch * shift)))
    return found


def speak(file: Path, text: str, voice: str, stretch: float, pitch: float) -> None:
    """One utterance: 16 kHz, and its text beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = ["--setf", f"duration_stretch={stretch:.3f}", "--setf", f"int_f0_target_mean={pitch:.1f}"]
    subprocess.run(["flite", "-voice", voice, *settings, "-t", text, "-o", str(file)], check=True)
    file.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spoken_digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder to write into")
    out = parser.parse_args(arguments).out
    todo = jobs(out)
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda job: speak(*job), todo))
    except FileNotFoundError:
        print("spoken_digits: the program flite is not installed", file=sys.stderr)
        return 1
    print(f"{out}: {len(todo):,} utterances")
    return 0


if __name__ == "__main__":
    sys.exit(main())
