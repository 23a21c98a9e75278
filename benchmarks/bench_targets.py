"""Regression targets from the teacher's layers, against normalising and stacking them like the original."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Size, normal, shapes

_EPS = 1e-5


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """The preset's top-K layers, extra tokens cut off as a view."""
    s = shapes(preset, size)
    target, d = s.cfg.target, s.cfg.dim

    def make(device: torch.device) -> Inputs:
        whole = (s.batch, s.extra + s.tokens, d)
        return {"layers": [normal(device, *whole, dtype=dtype)[:, s.extra :] for _ in range(target.top_k)]}

    def call(inputs: Inputs, backend: str | None) -> Tensor:
        return d2vkern.layer_targets(inputs["layers"], target.norm, target.final, backend=backend)

    def plain(inputs: Inputs) -> Tensor:
        wide = torch.promote_types(inputs["layers"][0].dtype, torch.float32)
        layers = [_normalised(layer.to(wide), target.norm) for layer in inputs["layers"]]
        return _normalised(torch.stack(layers).mean(0), target.final)

    cells = s.batch * s.tokens * d
    return [
        Case(
            op="layer_targets",
            name=f"top {target.top_k}",
            preset=preset,
            shape=f"B{s.batch} T{s.tokens} D{d} L{target.top_k}",
            dtype=dtype,
            make=make,
            call=call,
            plain=plain,
            forward=Cost(target.top_k * cells * dtype.itemsize + 4 * cells, 0),
        )
    ]


def _normalised(x: Tensor, norm: str | None) -> Tensor:
    if norm == "instance":
        return F.instance_norm(x.transpose(1, 2), eps=_EPS).transpose(1, 2)
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=_EPS)
    if norm == "batch":
        return F.batch_norm(x.transpose(1, 2), None, None, training=True, eps=_EPS).transpose(1, 2)
    return x
