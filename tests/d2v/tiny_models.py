"""Models of the shrunken tiny presets, and sources for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2v.model import Data2Vec
from tests.d2v.tiny_runs import tiny

SAMPLES = 16_000
TOKENS = {"image": 36, "audio": 49, "text": 24}


def make_model(modality: str, **changed: Any) -> Data2Vec:
    """The tiny model of tests/d2v/tiny_runs.py, in train mode; every dropout is 0 and
    images have a CLS loss unless changed."""
    torch.manual_seed(0)
    if modality == "image":
        changed = {"cls_loss": 0.01, "cls_rows": 256, **changed}
    return Data2Vec(tiny(modality, model=changed).model).train()


def make_source(modality: str, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if modality == "image":
        return torch.randn(batch, 1, 24, 24, generator=generator)
    if modality == "audio":
        return torch.randn(batch, SAMPLES, generator=generator)
    return torch.randint(4, 320, (batch, 24), generator=generator)
