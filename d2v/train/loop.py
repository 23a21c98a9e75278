"""What a run of pretraining and one of fine-tuning share: how it begins, where it stands, how it ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class RunError(RuntimeError):
    """A run that had begun could not go on; the message says what to resume from."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    out: Path
    step: int
    """last step done"""
    finished: bool
    """whether all of `train.steps` are done"""
    exit_code: int
    """0: finished, or stopped on request; 1: too many bad steps in a row"""
    seconds: float
    """spent in this call"""


@dataclass
class Place:
    """Where a run stands, beside weights and random states: its part of a checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    skipped: int = 0
    """bad steps so far"""
    bad_in_a_row: int = 0


def claim(out: Path) -> None:
    """Make the folder of a new run; one that holds anything is refused."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"train: --out must be a folder, {out} is a file")
    if (out / "config.toml").exists():
        raise ValueError(
            f"train: {out} holds a run already: continue it with `d2v train --resume {out}` "
            "or choose another --out"
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"train: {out} is not empty and holds no run: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
