"""Opening fine-tuned models: a run of `d2v finetune`, or a fine-tuned file of the original."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tomli_w

from ..checkpoint import (
    CheckpointError,
    _write_text,
    fill_model,
    latest_checkpoint,
    load_checkpoint,
)
from ..config import from_dict, to_dict
from .config import FineTuneConfig
from .model import FineTuned
from .original import load_original_tuned

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LABELS = "labels.json"
"""file of a run with its class names, or letters"""
BEST = "best"
"""folder of a run with the checkpoint that scored best on the first held-out part"""


def write_tuned_config(run: Path, cfg: FineTuneConfig, data: str, encoder: str) -> None:
    """`config.toml`: every setting, and under `[run]` where the data and the encoder were."""
    run.mkdir(parents=True, exist_ok=True)
    values = {"run": {"data": data, "encoder": encoder}, **to_dict(cfg)}
    _write_text(run / "config.toml", tomli_w.dumps(values))


def read_tuned_config(run: str | Path) -> tuple[FineTuneConfig, str, str]:
    """Config, data path and encoder path of a fine-tuning run. Raises CheckpointError naming the file."""
    path = Path(run) / "config.toml"
    values = _read(path)
    if not _is_tuned(values):
        raise CheckpointError(f"{path}: not a fine-tuning run: it has no [head]")
    try:
        where = values.pop("run")
        return from_dict(FineTuneConfig, values), where["data"], where["encoder"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def is_tuned_run(run: str | Path) -> bool:
    """Whether a folder is a fine-tuning run. Raises CheckpointError when its config.toml is damaged."""
    path = Path(run) / "config.toml"
    return path.is_file() and _is_tuned(_read(path))


def _is_tuned(values: dict[str, Any]) -> bool:
    return isinstance(values.get("head"), dict)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}: not a run directory") from error
    except ValueError as error:  # TOMLDecodeError is one
        raise CheckpointError(f"{path}: {error}") from error


def load_run(path: str | Path, *, step: int | None = None) -> tuple[FineTuned, FineTuneConfig, str]:
    """A fine-tuned model in eval mode, its config, and where its data was.

    step: of a checkpoint; none: the best one, or before the first evaluation the newest.
    Raises CheckpointError.
    """
    run = Path(path)
    cfg, data, _ = read_tuned_config(run)
    if step is not None:
        folder: Path | None = run / "checkpoints" / f"step_{step}"
    else:
        folder = latest_checkpoint(run / BEST) or latest_checkpoint(run)
    if folder is None:
        raise CheckpointError(f"{run}: no checkpoint in {run / 'checkpoints'}")
    model = FineTuned(cfg.model, cfg.head)
    fill_model(model, load_checkpoint(folder).model, folder)
    return model.eval(), cfg, data


def load_tuned_file(path: str | Path) -> FineTuned:
    """A fine-tuned model of the original in eval mode, from its `.pt`. Raises CheckpointError."""
    cfg, head, tensors = load_original_tuned(path)
    model = FineTuned(cfg, head)
    fill_model(model, tensors, path)
    return model.eval()
