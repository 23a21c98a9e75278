"""Residual connection and LayerNorm of a block; the preset's dropout is seeded, so that it can be checked.

In pictures' shapes the pre-norm form too, which returns the sum beside its norm, as ViTs of others have it.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs, Outputs, Unavailable
from benchmarks.shapes import Shapes, Size, normal, shapes
from d2vkern.reference._dropout import keep_mask

_SEED = 13


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """Without dropout, and with the preset's; pre-norm."""
    s = shapes(preset, size)
    rates = [0.0, s.cfg.encoder_dropout] if s.cfg.encoder_dropout else [0.0]
    found = [_case(s, dtype, p) for p in rates]
    return [*found, _case(s, dtype, 0.0, prenorm=True)] if preset.startswith("image") else found


def _case(s: Shapes, dtype: torch.dtype, dropout: float, prenorm: bool = False) -> Case:
    d, eps = s.cfg.dim, s.cfg.norm_eps

    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, s.rows, s.seen, d, dtype=dtype),
            "update": normal(device, s.rows, s.seen, d, dtype=dtype),
            "weight": normal(device, d, std=0.1) + 1,
            "bias": normal(device, d, std=0.1),
        }

    def call(inputs: Inputs, backend: str | None) -> Outputs:
        seed = _SEED if dropout else None
        out = d2vkern.residual_norm(
            **inputs, eps=eps, prenorm=prenorm, dropout_p=dropout, seed=seed, backend=backend
        )
        return out if isinstance(out, Tensor) else dict(zip(("sum", "norm"), out, strict=True))

    def plain(inputs: Inputs) -> Outputs:
        x, update = inputs["x"], inputs["update"]
        if dropout:
            update = update * keep_mask(tuple(x.shape), dropout, x.device, _SEED) / (1 - dropout)
        z = x + update
        y = F.layer_norm(z, (d,), inputs["weight"].to(x.dtype), inputs["bias"].to(x.dtype), eps)
        return {"sum": z, "norm": y} if prenorm else y

    def liger(inputs: Inputs) -> Tensor:
        try:
            layer_norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        except ImportError as error:
            raise Unavailable(f"liger: {error}") from error
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        return layer_norm.apply(x + inputs["update"], weight.to(x.dtype), bias.to(x.dtype), eps)

    tensor = s.rows * s.seen * d * dtype.itemsize
    return Case(
        op="residual_norm",
        name="student, prenorm" if prenorm else "student, dropout" if dropout else "student",
        preset=s.preset,
        shape=f"N{s.rows} S{s.seen} D{d}",
        dtype=dtype,
        make=make,
        call=call,
        plain=plain,
        leaves=("x", "update", "weight", "bias"),
        # the sum is kept for backward; without dropout x and update share one gradient; a sum has its own
        forward=Cost(4 * tensor + 8 * d, 0),
        backward=Cost((3 + (dropout > 0) + prenorm) * tensor + 16 * d, 0),
        peers={} if dropout or prenorm else {"liger": liger},
    )
