"""Convolution blocks of the decoder and the speech positional encoder, against conv, norm and GELU.

Columns: eager (channels-last), torch.compile of it, Triton; `pytorch` is conv, norm and GELU on channels-last
memory seen channels-first, as the original's norm leaves it, and `channels-first` the same on memory that is
channels-first too.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Shapes, Size, normal, shapes
from d2v.config.fronts import ImageFront, TextFront

_EPS = 1e-5


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """A middle decoder layer; where the model has them, the last at masked places and positional layers."""
    s = shapes(preset, size)
    dec, front = s.cfg.decoder, s.cfg.front
    residual = dec.residual
    if isinstance(front, ImageFront):
        kernel = (dec.kernel, dec.kernel)
        return [
            _case(s, "decoder", dtype, (s.rows, *front.grid), dec.dim, dec.groups, kernel, residual=residual)
        ]
    layer: dict[str, Any] = {
        "channels": dec.dim,
        "groups": dec.groups,
        "kernel": (dec.kernel,),
        "residual": residual,
    }
    found = [_case(s, "decoder", dtype, (s.rows, s.tokens), **layer)]
    if dec.groups == 1:
        found.append(_case(s, "decoder, masked places", dtype, (s.rows, s.tokens), **layer, at="rows"))
    if not isinstance(front, TextFront):
        s = s.longer(size)
        layer = {"channels": s.cfg.dim, "groups": front.position_groups, "kernel": (front.position_kernel,)}
        found.append(_case(s, "positions, first", dtype, (s.batch, s.tokens), **layer, at="plan"))
        found.append(_case(s, "positions", dtype, (s.rows, s.tokens), **layer))
    return found


def _case(
    s: Shapes,
    name: str,
    dtype: torch.dtype,
    grid: tuple[int, ...],
    channels: int,
    groups: int,
    kernel: tuple[int, ...],
    residual: bool = False,
    at: str | None = None,
) -> Case:
    """One layer over x [*grid, channels]; `at`: with `rows` or `plan`."""
    c, e = channels, dtype.itemsize

    def make(device: torch.device) -> Inputs:
        inputs: Inputs = {
            "x": normal(device, *grid, c, dtype=dtype),
            "weight": normal(device, c, c // groups, *kernel, std=(c // groups * prod(kernel)) ** -0.5),
            "bias": normal(device, c, std=0.1),
        }
        if at is not None:
            plan = s.random_plan(device)
            inputs[at] = plan if at == "plan" else plan.ids_mask
        return inputs

    def call(inputs: Inputs, backend: str | None) -> Tensor:
        op = d2vkern.conv_block_2d if len(kernel) == 2 else d2vkern.conv_block_1d
        return op(**inputs, groups=groups, residual=residual, eps=_EPS, backend=backend)

    def plain(inputs: Inputs) -> Tensor:
        return _one_by_one(inputs, groups, residual)

    def channels_first(inputs: Inputs) -> Tensor:
        return _one_by_one(inputs, groups, residual, contiguous=True)

    places = {None: prod(grid), "rows": s.rows * s.masked, "plan": s.rows * s.tokens}[at]
    read, written = prod(grid) * c * e, places * c * e
    weights = (c * c // groups * prod(kernel) + c) * 4
    flops = 2 * places * c * c // groups * prod(kernel)
    return Case(
        op=f"conv_block_{len(kernel)}d",
        name=name,
        preset=s.preset,
        shape=f"{'x'.join(map(str, grid))} C{c} k{'x'.join(map(str, kernel))} g{groups}",
        dtype=dtype,
        make=make,
        call=call,
        plain=plain,
        peers={"channels-first": channels_first},
        leaves=("x", "weight", "bias"),
        # the convolution's output is kept for backward
        forward=Cost(read + weights + 2 * written, flops),
        backward=Cost(2 * read + 2 * weights + 2 * written, 2 * flops),
    )


def _one_by_one(inputs: Inputs, groups: int, residual: bool, contiguous: bool = False) -> Tensor:
    """Channels first, as the original: conv, same padding, LayerNorm, GELU, residual.

    contiguous: the convolution's input is copied into channels-first memory.
    """
    x, weight = inputs["x"], inputs["weight"].to(inputs["x"].dtype)
    if "plan" in inputs:
        plan = inputs["plan"]
        x = x.repeat_interleave(plan.clones, 0).masked_fill(plan.mask.unsqueeze(2), 0)
    conv = F.conv2d if weight.dim() == 4 else F.conv1d
    bias, padding = inputs["bias"].to(x.dtype), weight.shape[-1] // 2
    first = x.movedim(-1, 1).contiguous() if contiguous else x.movedim(-1, 1)
    y = conv(first, weight, bias, padding=padding, groups=groups)
    for axis, length in enumerate(x.shape[1:-1], start=2):
        y = y.narrow(axis, 0, length)
    y = y.movedim(1, -1)
    y = F.gelu(F.layer_norm(y, y.shape[-1:], eps=_EPS))
    y = y + x if residual else y
    if "rows" in inputs:
        y = y.gather(1, inputs["rows"].long().unsqueeze(2).expand(-1, -1, y.shape[2]))
    return y
