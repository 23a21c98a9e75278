"""Opening fine-tuned models: a run of `d2v finetune`, or a fine-tuned file of the original."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import (
    SETTINGS,
    CheckpointError,
    fill_model,
    find_checkpoint,
    is_tuned,
    load_checkpoint,
    parse_settings,
    read_settings,
)
from ..hf.backbone import naming_release
from ..normalisation import as_recorded
from .config import FineTuneConfig
from .model import FineTuned, build_tuned
from .original import load_original_tuned

LABELS = "labels.json"
"""file of a run with its class names, or letters"""


def read_tuned_config(run: str | Path) -> tuple[FineTuneConfig, str, str]:
    """Config, data path and encoder path of a fine-tuning run. Raises CheckpointError naming the file."""
    values = read_settings(run)
    if not is_tuned(values):
        raise CheckpointError(f"{Path(run) / SETTINGS}: not a fine-tuning run: it has no [head]")
    cfg, (data, encoder) = parse_settings(FineTuneConfig, run, values, "data", "encoder")
    return cfg, data, encoder


def load_run(path: str | Path, *, step: int | None = None) -> tuple[FineTuned, FineTuneConfig, str]:
    """A fine-tuned model in eval mode, its config (pictures normalised as recorded), and where its data was.

    path: a run or a checkpoint folder in it. step: of a run's checkpoint; none: the best one, or before the
    first evaluation the newest. Raises CheckpointError.
    """
    run, folder = find_checkpoint(path, step)
    cfg, data, _ = read_tuned_config(run)
    model = build_tuned(cfg)
    with naming_release(cfg.transformers):
        fill_model(model, load_checkpoint(folder).model, folder)
    return model.eval(), as_recorded(cfg, run), data


def load_tuned_file(path: str | Path) -> FineTuned:
    """A fine-tuned model of the original in eval mode, from its `.pt`. Raises CheckpointError."""
    cfg, head, tensors = load_original_tuned(path)
    model = FineTuned(cfg, head)
    fill_model(model, tensors, path)
    return model.eval()
