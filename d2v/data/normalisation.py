"""How pictures and waveforms were normalised: made when a run begins and kept beside its weights ever after.

A model sees (picture - mean) / std, channel by channel, bytes as 0..1; with other numbers it is another one.
So pretraining measures once, on its training pictures (or takes what it is given, or ImageNet's), and all
that follows reads the record: resuming, the online probe, races, probes, features, fine-tuning, its
evaluation on other data, and every conversion. It lies

- in a run, pretraining or fine-tuning: `config.toml`, [run.normalisation];
- in a folder of `d2v convert --to safetensors`: `config.json`, "normalisation";
- in a folder for transformers: `preprocessor_config.json`, image_mean and image_std;
- in a `.pt` file of ours: "d2v", which the original does not read: it normalises with ImageNet's. Of its own
  files, which hold none, that is the value.

Of speech the same holds for `data.wave_norm` (and the sample rate, which is the front end's): among a run's
settings, "wave_norm" of a folder's `config.json`, task.normalize of a `.pt` file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..config.fronts import Front, ImageFront
from ..config.run import DataConfig
from ..config.toml import SETTINGS, CheckpointError, read_settings

Origin = Literal["imagenet", "measured", "given", "encoder", "preprocessor"]
"""ImageNet's, for three channels of bytes; measured on the training pictures; data.mean and data.std; of the
encoder that was fine-tuned; of a folder for transformers"""

PREPROCESSOR = "preprocessor_config.json"
KEY = "normalisation"
"""of the record, in our own files"""
WAVES = "wave_norm"
OURS = "d2v"
"""what the original does not read of a `.pt` file, nor transformers of a config"""
C = TypeVar("C", bound=Any)


@dataclass(frozen=True)
class Normalisation:
    """Mean and deviation of each channel, of pictures whose bytes are 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: Origin

    @property
    def record(self) -> dict[str, Any]:
        """As it is written to JSON and TOML."""
        return {"mean": list(self.mean), "std": list(self.std), "origin": self.origin}

    def __str__(self) -> str:
        mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}"

    def same_as(self, other: Normalisation | None) -> bool:
        """Whether the numbers are equal, wherever they are from."""
        return other is not None and (self.mean, self.std) == (other.mean, other.std)


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "imagenet")


def checked(mean: Any, std: Any, origin: Origin, channels: int, name: str) -> Normalisation:
    """The value, of numbers from outside. name: what "mean" and "std" are written after in a ValueError."""
    for key, values in (("mean", mean), ("std", std)):
        if not isinstance(values, (list, tuple)) or len(values) != channels:
            raise ValueError(f"{name}{key} must have {channels} values (front.channels), got {values}")
        if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise ValueError(f"{name}{key} must be finite numbers, got {values}")
    if min(std) <= 0:
        raise ValueError(f"{name}std must be positive, got {std}")
    return Normalisation(tuple(map(float, mean)), tuple(map(float, std)), origin)


def given(data: DataConfig, channels: int) -> Normalisation | None:
    """What data.mean and data.std say; None where they say nothing. ValueError."""
    if data.mean is None and data.std is None:
        return None
    return checked(data.mean, data.std, "given", channels, "data: data.")


def normalised(cfg: C, value: Normalisation | None) -> C:
    """The config (`Config` or `FineTuneConfig`) whose pictures are read with `value`; as it is for None."""
    if value is None:
        return cfg
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, mean=value.mean, std=value.std))


def of_run(run: Path, front: Front) -> Normalisation | None:
    """The record of a run; None without one, and where it does not read pictures.

    Older runs have what they were given or took over among their settings, and what they measured in
    data.json. Raises CheckpointError naming file and key.
    """
    if not isinstance(front, ImageFront):
        return None
    settings, file = read_settings(run), run / SETTINGS
    about, data = settings.get("run", {}), settings.get("data", {})
    if isinstance(about, dict) and KEY in about:
        return parsed(about[KEY], front, file, f"run.{KEY}")
    if isinstance(data, dict) and {"mean", "std"} & data.keys():
        return parsed({**data, "origin": "given"}, front, file, "data")
    file = run / "data.json"
    meta = read_json(file).get("meta", {}) if file.is_file() else {}
    if "mean" not in meta:
        return None
    value = parsed({**meta, "origin": "measured"}, front, file, "meta")
    return IMAGENET if value.same_as(IMAGENET) else value


def of_preprocessor(folder: Path, channels: int) -> Normalisation | None:
    """What preprocessor_config.json of a folder we exported does to pictures; see `of_image_processor`."""
    file = folder / PREPROCESSOR
    return of_image_processor(read_json(file) if file.is_file() else {}, channels, str(file))


def of_image_processor(values: Mapping[str, Any], channels: int, where: str) -> Normalisation | None:
    """What an image processor of transformers does to pictures, of bytes as 0..1.

    values: its settings; None where they hold no numbers. where: named in errors. Raises CheckpointError.
    """
    mean, std = (values.get(f"image_{name}") for name in ("mean", "std"))
    rescale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    if not values.get("do_normalize", True):
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        return None
    mean, std = ([v] * channels if isinstance(v, (int, float)) else v for v in (mean, std))
    try:
        value = checked(mean, std, "preprocessor", channels, f"{where}: image_")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(rescale, (int, float)) or not 0 < rescale < math.inf:
        raise CheckpointError(f"{where}: rescale_factor must be positive, got {rescale}")
    if math.isclose(rescale, 1 / 255, rel_tol=1e-6):
        return value
    mean, std = (tuple(v / (255 * rescale) for v in values) for values in (value.mean, value.std))
    return Normalisation(mean, std, "preprocessor")


def parsed(values: Any, front: ImageFront, file: Path, key: str) -> Normalisation:
    """A record of ours. CheckpointError."""
    values = values if isinstance(values, Mapping) else {}
    try:
        return checked(
            values.get("mean"),
            values.get("std"),
            values.get("origin", "given"),
            front.channels,
            f"{file}: {key}.",
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: damaged: not an object")
    return values
