"""Settings that a command does not read: what sets one of them is refused instead of having no effect."""

from __future__ import annotations

from typing import Any

from .run import Config
from .toml import flatten, to_dict
from .tune import FineTuneConfig

OF_MODALITY = {
    "image": ("crop_scale", "flip", "mean", "std", "max_pixels"),
    "audio": ("max_seconds", "min_seconds", "pad", "wave_norm", "bucket_seconds"),
    "text": ("block", "tokenizer"),
}
"""fields of `data` that one modality alone reads"""
NAMES = {"image": "pictures", "audio": "speech", "text": "text"}
RACE = (
    "train.save_every", "train.keep", "train.log_every", "train.max_bad_steps", "train.min_rank",
    "train.min_variance", "train.alarm_after", "probe.every", "probe.layers",
)  # fmt: skip
"""a race writes no checkpoints and no metrics, and probes all blocks as often as --evaluations says"""


def _data(modality: str) -> dict[str, str]:
    return {
        f"data.{field}": f"{NAMES[modality]}: {NAMES[other]} alone read it"
        for other, fields in OF_MODALITY.items()
        if other != modality
        for field in fields
    }


def unread_in_pretraining(cfg: Config) -> dict[str, str]:
    """Setting, or section with a dot at its end -> for what it is not read."""
    found, objective = _data(cfg.model.modality), cfg.model.objective
    if objective != "data2vec2":
        found["model.decoder."] = f"objective {objective}"
    if objective != "mae":
        found["model.mae."] = f"objective {objective}"
    if objective in ("mae", "mlm"):
        found |= dict.fromkeys(("ema.", "model.target."), f"objective {objective}, which has no teacher")
    if not cfg.probe.every:
        found |= dict.fromkeys(("probe.data", "probe.rows", "probe.layers"), "--probe.every 0")
    return found


def unread_in_race(cfg: Config) -> dict[str, str]:
    """As `unread_in_pretraining`."""
    return {**_data(cfg.model.modality), **dict.fromkeys(RACE, "a race")}


def unread_in_finetuning(cfg: FineTuneConfig) -> dict[str, str]:
    """As `unread_in_pretraining`."""
    task, modality = cfg.head.task, cfg.model.modality
    found = {**_data(modality), "data.tokenizer": "fine-tuning, which takes the encoder's"}
    if task != "ctc":
        found |= {"span.": f"task {task}", "vocabulary": f"task {task}"}
    else:
        found["data.pad"] = "task ctc, which always pads"
    if task != "sentence":
        found["glue"] = f"task {task}"
    if modality != "image":
        fields = [name for name in to_dict(cfg.augment) if name != "label_smoothing"]
        found |= dict.fromkeys((f"augment.{name}" for name in fields), NAMES[modality])
    if task == "ctc" or cfg.head.regression:
        found["augment.label_smoothing"] = f"task {task}" if task == "ctc" else "numbers as labels"
    return found


def refuse_unread(command: str, given: Any, base: Any, unread: dict[str, str]) -> None:
    """ValueError for a setting of `given` that is another than that of `base` and is not read."""
    now, before = flatten(to_dict(given)), flatten(to_dict(base))
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) == before.get(key):
            continue
        for name, reason in unread.items():
            if key == name or (name.endswith(".") and key.startswith(name)):
                flag = key.replace("_", "-")
                raise ValueError(f"d2v {command}: --{flag} has no effect for {reason}")
