"""The original's numbers: cases of the golden files, and models that hold their weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v.formats.fairseq_config import translate
from d2v.model import Data2Vec

CASES = ("image_base", "audio_base", "audio_padded", "text_base")


@dataclass
class Case:
    """One golden case: facts, tensors, weights under the original's names (`_ema.` for the teacher's)."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]

    def model(self) -> Data2Vec:
        """A model with the case's architecture and weights, in train mode (every dropout is 0)."""
        shapes = {name: tuple(t.shape) for name, t in self.weights.items()}
        model = Data2Vec(translate({"model": self.facts["cfg"]}, shapes, self.facts["case"]))
        model.load_state_dict(self.weights)
        return model.train()

    def inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of the model's forward."""
        return {
            "source": self.tensors["in.source"],
            "padding_mask": self.tensors.get("in.padding_mask"),
            "mask": self.tensors["in.precomputed_mask"],
        }


def load(goldens: Path, name: str) -> Case:
    """Read a case and its weights file."""
    facts = json.loads((goldens / f"case_{name}.json").read_text())
    tensors = _arrays(goldens / f"case_{name}.npz")
    return Case(facts, tensors, _arrays(goldens / facts["weights"]))


def _arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}
