"""How a model's pictures and waveforms were normalised, by its files: see `d2v.data.normalisation`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast, get_args

from ..config.fronts import Front, ImageFront, LogMelFront, WaveformFront
from ..config.run import WaveNorm
from ..config.toml import SETTINGS, CheckpointError, read_settings
from ..data.normalisation import (
    IMAGENET,
    KEY,
    OURS,
    PREPROCESSOR,
    WAVES,
    C,
    Normalisation,
    normalised,
    of_preprocessor,
    of_run,
    parsed,
    read_json,
)
from ..train.checkpoint import find_run
from .fairseq import wave_norm
from .folder import CONFIG
from .pt_file import PtFile


def as_recorded(cfg: C, path: Path) -> C:
    """The config whose pictures and waveforms are read as those that the model at `path` was trained on."""
    cfg = normalised(cfg, recorded(path, cfg.model.front))
    if (waves := recorded_waves(path, cfg.model.front)) is None:
        return cfg
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, wave_norm=waves))


def recorded(path: Path, front: Front) -> Normalisation | None:
    """The record of a run (or a checkpoint folder), a converted folder or a `.pt` file; None without one.

    front: of the model there. Raises CheckpointError naming file and key.
    """
    if not isinstance(front, ImageFront):
        return None
    if not path.is_dir():
        with PtFile(path) as held:
            known = ours(held)
        if KEY in known:
            return parsed(known[KEY], front, path, f"{OURS}.{KEY}")
        return IMAGENET if front.channels == len(IMAGENET.mean) else None
    path = find_run(path)[0]
    if (path / SETTINGS).is_file():
        return of_run(path, front)
    if (path / PREPROCESSOR).is_file():
        return of_preprocessor(path, front.channels)
    values = read_json(path / CONFIG)
    return parsed(values[KEY], front, path / CONFIG, KEY) if KEY in values else None


def recorded_waves(path: Path, front: Front) -> WaveNorm | None:
    """As `recorded`, how waveforms were normalised: fairseq's way if nothing is said; None without waves."""
    if not isinstance(front, (WaveformFront, LogMelFront)):
        return None
    if not path.is_dir():
        with PtFile(path) as held:
            file, known = path, ours(held)
            found = known[WAVES] if WAVES in known else wave_norm(held)
    elif (file := (run := find_run(path)[0]) / SETTINGS).is_file():
        found = read_settings(run).get("data", {}).get(WAVES, "fairseq")
    else:
        file = run / CONFIG
        values = read_json(file)
        found = values.get(OURS, values).get(WAVES, "fairseq")
    if found not in get_args(WaveNorm):
        raise CheckpointError(
            f"{file}: {WAVES} must be one of {', '.join(get_args(WaveNorm))}, got {found!r}"
        )
    return cast(WaveNorm, found)


def ours(file: PtFile) -> dict[str, Any]:
    """What `d2v convert` has put into a file beside what the original reads."""
    found = file.root.get(OURS) if isinstance(file.root, dict) else None
    return found if isinstance(found, dict) else {}
