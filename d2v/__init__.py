"""data2vec 2.0 for images, speech and text: `load` a model, or make one from a `preset`.

Everything heavy is imported when first used, so that `d2v --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .presets import preset

if TYPE_CHECKING:
    import torch

    from d2vkern import __version__

    from .checkpoint import CheckpointError
    from .finetune.model import FineTuned
    from .model import Data2Vec, Pretraining

__all__ = ["CheckpointError", "Data2Vec", "FineTuned", "__version__", "load", "preset"]


def load(
    path: str | Path, *, device: str | torch.device = "cpu", step: int | None = None
) -> Pretraining | FineTuned:
    """A model in eval mode from any of four kinds of `path`.

    A run directory (its newest checkpoint, of a fine-tuned one the best, or that of `step`), a checkpoint
    folder in it (`checkpoints/step_N`; `checkpoints`, `best` and what lies in there likewise), a folder of
    `d2v convert`, or a `.pt` file of the original, which needs neither fairseq nor omegaconf and runs no
    code. What was pretrained is a `Data2Vec`, its teacher loaded (or another `d2v.model.Pretraining`, if that
    was its objective); what was fine-tuned, here or by the original, is a `FineTuned` with `.logits()`.
    Raises `CheckpointError`, naming the file, when anything is missing, damaged or not supported.
    """
    from .checkpoint import (
        CheckpointError,
        fill_model,
        find_checkpoint,
        is_tuned,
        load_checkpoint,
        read_config,
        read_settings,
    )
    from .convert import is_folder, load_folder
    from .model import build_model
    from .original import is_finetuned, load_original

    path = Path(path)
    if is_folder(path):
        if step is not None:
            raise ValueError(f"load: step must be None for a converted folder, got {step}")
        return load_folder(path).to(device).eval()
    if not path.is_dir():
        if step is not None:
            raise ValueError(f"load: step must be None for a file, got {step}")
        if path.suffix in (".safetensors", ".json", ".toml") and path.is_file():
            raise CheckpointError(f"{path}: a part of a model's folder: give {path.parent}")
        if is_finetuned(path):
            from .finetune.load import load_tuned_file

            return load_tuned_file(path).to(device)
        config, tensors = load_original(path)
    else:
        run, folder = find_checkpoint(path, step)
        if is_tuned(read_settings(run)):
            from .finetune.load import load_run

            return load_run(path, step=step)[0].to(device)
        config, tensors = read_config(run)[0].model, load_checkpoint(folder).model
    model = build_model(config)
    fill_model(model, tensors, path)
    return model.to(device).eval()


def __getattr__(name: str) -> Any:
    if name == "Data2Vec":
        from .model import Data2Vec

        return Data2Vec
    if name == "FineTuned":
        from .finetune.model import FineTuned

        return FineTuned
    if name == "CheckpointError":
        from .checkpoint import CheckpointError

        return CheckpointError
    if name == "__version__":
        from d2vkern import __version__

        return __version__
    raise AttributeError(f"module 'd2v' has no attribute {name!r}")
