"""What the folders of `d2v convert` hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..train.checkpoint import LABELS as LABELS

FORMAT = "d2v-1"
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
VOCABULARY = "vocabulary.json"


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder of `save_folder` or `write_folder`."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, in the host's: what a file can hold."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
