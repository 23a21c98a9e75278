"""The student block's MLP, and the text decoder's projection, against two linear layers with GELU between.

Beside them the projection to queries, keys and values, as a linear layer alone, and in pictures' shapes the
MLP with GELU's tanh form, which vision models of others have.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Shapes, Size, normal, shapes


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """The block's; the projection's where it has two layers; the linear layer."""
    s = shapes(preset, size)
    dec, dim = s.cfg.decoder, s.cfg.dim
    block = dim, int(dim * s.cfg.mlp_ratio), dim
    found = [_case(s, "student", s.rows * s.seen, block, dtype)]
    if preset.startswith("image"):
        found.append(_case(s, "student, tanh", s.rows * s.seen, block, dtype, "tanh"))
    if dec.projection_layers == 2:
        widths = (dec.dim, int(dec.dim * dec.projection_ratio), dim)
        found.append(_case(s, "projection", s.rows * s.masked, widths, dtype))
    return [*found, _linear(s, "queries, keys, values", s.rows * s.seen, dim, 3 * dim, dtype)]


def _case(
    s: Shapes,
    name: str,
    rows: int,
    widths: tuple[int, int, int],
    dtype: torch.dtype,
    approximate: Literal["none", "tanh"] = "none",
) -> Case:
    d, f, o = widths
    e = dtype.itemsize

    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, rows, d, dtype=dtype),
            "w1": normal(device, f, d, std=d**-0.5),
            "b1": normal(device, f, std=0.1),
            "w2": normal(device, o, f, std=f**-0.5),
            "b2": normal(device, o, std=0.1),
        }

    def call(inputs: Inputs, backend: str | None) -> Tensor:
        return d2vkern.gelu_mlp(**inputs, approximate=approximate, backend=backend)

    def plain(inputs: Inputs) -> Tensor:
        x = inputs["x"]
        w1, b1, w2, b2 = (inputs[name].to(x.dtype) for name in ("w1", "b1", "w2", "b2"))
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)

    weights = 4 * (f * d + f + o * f + o)
    flops = 2 * rows * f * (d + o)
    return Case(
        op="gelu_mlp",
        name=name,
        preset=s.preset,
        shape=f"{rows} x {d}-{f}-{o}",
        dtype=dtype,
        make=make,
        call=call,
        plain=plain,
        leaves=("x", "w1", "b1", "w2", "b2"),
        # the activation passes from one product to the next, the pre-activation is kept for backward
        forward=Cost(rows * (d + 3 * f + o) * e + weights, flops),
        backward=Cost(rows * (2 * d + 4 * f + 2 * o) * e + 2 * weights, 2 * flops),
    )


def _linear(s: Shapes, name: str, rows: int, d: int, o: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, rows, d, dtype=dtype),
            "weight": normal(device, o, d, std=d**-0.5),
            "bias": normal(device, o, std=0.1),
        }

    def plain(inputs: Inputs) -> Tensor:
        x = inputs["x"]
        return F.linear(x, inputs["weight"].to(x.dtype), inputs["bias"].to(x.dtype))

    weights = 4 * (o * d + o)
    flops = 2 * rows * d * o
    return Case(
        op="linear",
        name=name,
        preset=s.preset,
        shape=f"{rows} x {d}-{o}",
        dtype=dtype,
        make=make,
        call=lambda inputs, backend: d2vkern.linear(**inputs, backend=backend),
        plain=plain,
        leaves=("x", "weight", "bias"),
        forward=Cost(rows * (d + o) * dtype.itemsize + weights, flops),
        backward=Cost(rows * (2 * d + 2 * o) * dtype.itemsize + 2 * weights, 2 * flops),
    )
