"""From tokens to one vector a sample."""

from __future__ import annotations

from torch import Tensor


def mean_over_tokens(x: Tensor, padding: Tensor | None) -> Tensor:
    """[B,T,D] to [B,D], padding left out."""
    if padding is None:
        return x.mean(1)
    real = (~padding).unsqueeze(-1)
    return (x * real).sum(1) / real.sum(1).clamp(min=1)
