"""Losses of fine-tuning that torch does not have as we need them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.tuned import BLANK


def ctc_loss(logits: Tensor, frames: np.ndarray, labels: Sequence[np.ndarray]) -> Tensor:
    """0-dim fp32: the CTC loss summed over the utterances, infinite ones counted as 0.

    logits: [B,T,V] fp32. frames: [B], how many of each utterance are no padding. labels: its letters.
    No device is waited for.
    Source: fairseq/criterions/ctc.py with zero_infinity.
    """
    return F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        torch.from_numpy(np.concatenate(labels)).to(logits.device, non_blocking=True),
        torch.from_numpy(frames),
        torch.tensor([len(label) for label in labels]),
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )


def soft_cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """0-dim: summed over the samples. logits, soft: [B,outputs]."""
    return -(soft * logits.log_softmax(-1)).sum()
