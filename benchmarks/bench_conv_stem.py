"""The layers of the speech feature encoder, each on its own.

Columns: eager (channels-last, products over strided views), torch.compile of it, Triton; `pytorch` is conv,
norm and GELU on channels-last memory seen channels-first, as the original's norm leaves it, and
`channels-first` the same on memory that is channels-first too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Shapes, Size, normal, shapes
from d2v.config.fronts import WaveformFront

_EPS = 1e-5


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """Every layer; none for a front end without a convolutional stem."""
    s = shapes(preset, size)
    front = s.cfg.front
    if not isinstance(front, WaveformFront):
        return []
    found = []
    length, channels = s.samples, 1
    for i, (width, kernel, stride) in enumerate(front.conv_layers):
        found.append(_case(s, i, length, channels, width, kernel, stride, dtype))
        length, channels = (length - kernel) // stride + 1, width
    return found


def _case(
    s: Shapes,
    index: int,
    length: int,
    channels: int,
    width: int,
    kernel: int,
    stride: int,
    dtype: torch.dtype,
) -> Case:
    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, s.batch, length, channels, dtype=dtype),
            "weight": normal(device, width, channels, kernel, std=(channels * kernel) ** -0.5),
            "norm_weight": normal(device, width, std=0.1) + 1,
            "norm_bias": normal(device, width, std=0.1),
        }

    def call(inputs: Inputs, backend: str | None) -> Tensor:
        return d2vkern.conv_stem(**inputs, stride=stride, eps=_EPS, backend=backend)

    def plain(inputs: Inputs, contiguous: bool = False) -> Tensor:
        x = inputs["x"]
        weight, scale, shift = (inputs[name].to(x.dtype) for name in ("weight", "norm_weight", "norm_bias"))
        first = x.transpose(1, 2).contiguous() if contiguous else x.transpose(1, 2)
        y = F.conv1d(first, weight, stride=stride).transpose(1, 2)
        return F.gelu(F.layer_norm(y, (width,), scale, shift, _EPS))

    def channels_first(inputs: Inputs) -> Tensor:
        return plain(inputs, contiguous=True)

    frames = (length - kernel) // stride + 1
    read, written = (s.batch * t * c * dtype.itemsize for t, c in ((length, channels), (frames, width)))
    weights = (width * channels * kernel + 2 * width) * 4
    flops = 2 * s.batch * frames * width * channels * kernel
    into_x = index > 0  # the waveform needs no gradient
    return Case(
        op="conv_stem",
        name=f"layer {index}",
        preset=s.preset,
        shape=f"B{s.batch} T{length} C{channels}->{width} k{kernel} s{stride}",
        dtype=dtype,
        make=make,
        call=call,
        plain=plain,
        peers={"channels-first": channels_first},
        leaves=(*(["x"] if into_x else []), "weight", "norm_weight", "norm_bias"),
        # the convolution's output is kept for backward
        forward=Cost(read + weights + 2 * written, flops),
        backward=Cost(read * (1 + into_x) + 2 * weights + 2 * written, flops * (1 + into_x)),
    )
