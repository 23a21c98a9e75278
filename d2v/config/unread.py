"""Settings that a command does not read: what sets one of them is refused instead of having no effect.

Each `unread_in_...` gives the setting, or the section with a dot at its end, and why it is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from .fronts import Modality, TextFront
from .model import ModelConfig
from .run import Config, DataConfig, OptimConfig
from .toml import flatten, to_dict
from .tune import AugmentConfig, DropConfig, FineTuneConfig

OF_MODALITY = {
    "image": ("crop_scale", "flip", "mean", "std", "max_pixels", "label_column"),
    "audio": (
        "max_seconds",
        "min_seconds",
        "pad",
        "wave_norm",
        "channels",
        "bucket_seconds",
        "label_column",
        "text_column",
        "audio_column",
    ),
    "text": ("text_column", "label_column", "block", "tokenizer"),
}
"""fields of `data` that not every modality reads"""
OF_SCHEDULE = {
    "cosine": ("warmup", "min_lr"),
    "tri_stage": ("stages", "end_scale"),
    "polynomial": ("warmup", "min_lr", "power"),
    "constant": ("warmup",),
}
"""fields of `optim` that a schedule reads; no other one reads what stands in none of them"""
NAMES = {"image": "pictures", "audio": "speech", "text": "text"}
OF_RUNS = (
    "train.save_every", "train.keep", "train.log_every", "train.max_bad_steps", "train.min_rank",
    "train.min_variance", "train.alarm_after",
)  # fmt: skip
"""what saves, says and watches: a race and a profile do without"""
Unread = dict[str, str]


def unread_in_pretraining(cfg: Config) -> Unread:
    """Of `d2v train`."""
    found = _model(cfg.model) | _data(cfg.model.modality) | _schedule(cfg.optim)
    if not cfg.probe.every and cfg.model.modality == "text":
        found["data.label_column"] = "with --probe.every 0"
    if not cfg.probe.every:
        found |= _each("probe.", ("data", "rows", "layers"), "with --probe.every 0")
    return found


def unread_in_race(cfg: Config) -> Unread:
    """Of `d2v race`, which has its own seeds, writes no checkpoints and no metrics, and probes all blocks as
    often as --evaluations says."""
    found = _data(cfg.model.modality) | _schedule(cfg.optim)
    return found | dict.fromkeys((*OF_RUNS, "train.seed", "probe.every", "probe.layers"), "in a race")


def unread_in_profile(cfg: Config, *, on_data: bool, short: tuple[str, ...] = ()) -> Unread:
    """Of `d2v profile`. on_data: whether --data is given. short: settings that have their own flag, given."""
    found = _model(cfg.model) | _schedule(cfg.optim) | dict.fromkeys(OF_RUNS, "in a profile")
    if on_data:
        found |= _data(cfg.model.modality)
    else:
        sizes = {"batch", {"image": "batch", "audio": "max_seconds", "text": "block"}[cfg.model.modality]}
        found |= _each("data.", _names(DataConfig) - sizes, "without --data")
    return found | {name: f"with --{name.partition('.')[2]}" for name in short}


def unread_in_finetuning(cfg: FineTuneConfig, *, ours: bool = True) -> Unread:
    """Of `d2v finetune`. ours: whether the encoder is one of ours, not of transformers."""
    task, modality = cfg.head.task, cfg.model.modality
    found = _data(modality) | _schedule(cfg.optim)
    found["data.tokenizer"] = "for fine-tuning, which takes the encoder's"
    if task != "ctc":
        found |= dict.fromkeys(("span.", "vocabulary"), f"for task {task}")
        if modality == "audio":
            found["data.text_column"] = f"for task {task}"
    else:
        found["data.pad"] = "for task ctc, which always pads"
        found["data.label_column"] = "for task ctc"
        found |= {f"span.{name}_length": f"with --span.{name}-prob 0"
                  for name in ("time", "channel") if not getattr(cfg.span, f"{name}_prob")}  # fmt: skip
    if cfg.glue is not None:
        found |= _each(
            "data.", ("text_column", "label_column"), f"with --glue {cfg.glue}, whose columns are known"
        )
    if task != "sentence":
        found |= dict.fromkeys(("glue", "drop.head"), f"for task {task}")
    if not ours:
        reason = "for a model of transformers, whose dropouts are its own"
        found |= _each("drop.", _names(DropConfig) - {"head"}, reason)
    return found | _augment(cfg.augment, task, modality, numbers=cfg.head.regression)


def _names(section: type) -> set[str]:
    return {f.name for f in dataclasses.fields(section)}


def _each(section: str, names: Iterable[str], reason: str) -> Unread:
    return dict.fromkeys((f"{section}{name}" for name in names), reason)


def _data(modality: Modality) -> Unread:
    found: Unread = {}
    for name in {name for fields in OF_MODALITY.values() for name in fields}.difference(
        OF_MODALITY[modality]
    ):
        readers = " and ".join(NAMES[other] for other, fields in OF_MODALITY.items() if name in fields)
        found[f"data.{name}"] = f"for {NAMES[modality]}: {readers} alone read it"
    return found


def _schedule(optim: OptimConfig) -> Unread:
    known = {name for fields in OF_SCHEDULE.values() for name in fields}
    unread = known - set(OF_SCHEDULE[optim.schedule])
    return _each("optim.", unread, f"with --optim.schedule {optim.schedule}")


def _model(cfg: ModelConfig) -> Unread:
    found: Unread = {}
    objective, front = cfg.objective, cfg.front
    if objective != "data2vec2":
        found["model.decoder."] = f"for objective {objective}"
    elif cfg.decoder.projection_layers == 1:
        found["model.decoder.projection_ratio"] = "with --model.decoder.projection-layers 1"
    if objective != "mae":
        found["model.mae."] = f"for objective {objective}"
    if objective in ("mae", "mlm"):
        fields = ("ema.", "model.target.", "model.ema_encoder_only", "model.loss_beta", "model.loss_scale")
        found |= dict.fromkeys(fields, f"for objective {objective}, which has no teacher")
    if cfg.mask_kind == "random":
        found |= _each("model.mask.", ("length", "adjust"), "for random masks")
    if not cfg.cls_loss:
        found["model.cls_rows"] = "with --model.cls-loss 0"
    if isinstance(front, TextFront):
        if objective not in ("data2vec1", "mlm"):
            found["model.front.mask_id"] = f"for objective {objective}"
        if not cfg.prenet_depth:
            found["model.prenet_dropout"] = "for text with --model.prenet-depth 0"
    return found


def _augment(augment: AugmentConfig, task: str, modality: Modality, *, numbers: bool) -> Unread:
    found: Unread = {}
    if modality != "image":
        found |= _each("augment.", _names(AugmentConfig) - {"label_smoothing"}, f"for {NAMES[modality]}")
        if task == "ctc" or numbers:
            found["augment.label_smoothing"] = f"for {'task ctc' if task == 'ctc' else 'numbers as labels'}"
        return found
    if not augment.rand_ops:
        found["augment.rand_magnitude"] = "with --augment.rand-ops 0"
    if not (augment.mixup or augment.cutmix):
        fields = ("mix_probability", "mix_switch", "mix_batch")
        found |= _each("augment.", fields, "without --augment.mixup and --augment.cutmix")
    elif not (augment.mixup and augment.cutmix):
        found["augment.mix_switch"] = "without both of --augment.mixup and --augment.cutmix"
    return found


def refuse_unread(command: str, given: Any, base: Any, unread: Unread) -> None:
    """ValueError for a setting of `given` that is another than that of `base` and is not read."""
    now, before = flatten(to_dict(given)), flatten(to_dict(base))
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) == before.get(key):
            continue
        for name, reason in unread.items():
            if key == name or (name.endswith(".") and key.startswith(name)):
                flag = key.replace("_", "-")
                raise ValueError(f"d2v {command}: --{flag} has no effect {reason}")
