"""Attention over the kept tokens (student) and over all of them (teacher), against a materialised bias.

Plain PyTorch is the original's style: bias [N,H,S,S], all scores, softmax in fp32. It builds the bias inside
the timed call, because it stands in for what the op is given: positions and a learned scale. SDPA, flex and
xformers are backends of the op and appear with the others; "compile" is torch.compile of eager, which while
traced is the same plain formula. Dropout is seeded, so that it can be checked; backends that draw other bits
are left out of those cases.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Shapes, Size, normal, shapes
from d2v.config.fronts import ImageFront, TextFront
from d2v.model.blocks import alibi_slopes
from d2vkern.reference._dropout import keep_mask

_SEED = 11


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """Student, student with the preset's dropout, teacher (forward alone)."""
    s = shapes(preset, size)
    found = [_case(s, "student", s.rows, s.seen, dtype, 0.0)]
    if s.cfg.attention_dropout:
        found.append(_case(s, "student, dropout", s.rows, s.seen, dtype, s.cfg.attention_dropout))
    return [*found, _case(s, "teacher", s.batch, s.extra + s.tokens, dtype, 0.0)]


def _case(s: Shapes, name: str, rows: int, seen: int, dtype: torch.dtype, dropout: float) -> Case:
    heads = s.cfg.heads
    width = s.cfg.dim // heads
    alibi = not isinstance(s.cfg.front, (ImageFront, TextFront)) and s.cfg.front.alibi
    teacher = name == "teacher"

    def make(device: torch.device) -> Inputs:
        inputs: Inputs = {"qkv": normal(device, rows, seen, 3, heads, width, dtype=dtype)}
        if alibi:
            places = s.random_plan(device).ids_keep
            if teacher:
                places = torch.arange(s.tokens, dtype=torch.int32, device=device).expand(rows, -1)
            inputs["positions"] = F.pad(places, (s.extra, 0), value=-1)
            inputs["slopes"] = alibi_slopes(heads).to(device)
            inputs["alibi_scale"] = normal(device, heads, std=0.1) + 1
        return inputs

    def call(inputs: Inputs, backend: str | None) -> Tensor:
        return d2vkern.multimask_attention(
            **inputs, dropout_p=dropout, seed=_SEED if dropout else None, backend=backend
        )

    tensor, products = rows * seen * s.cfg.dim * dtype.itemsize, 4 * rows * seen * seen * s.cfg.dim
    places_bytes = rows * seen * 4 * alibi
    return Case(
        op="multimask_attention",
        name=name,
        preset=s.preset,
        shape=f"N{rows} S{seen} H{heads} Dh{width}" + " alibi" * alibi,
        dtype=dtype,
        make=make,
        call=call,
        plain=partial(_materialised, dropout=dropout),
        leaves=() if teacher else ("qkv", *(["alibi_scale"] if alibi else [])),
        forward=Cost(4 * tensor + places_bytes, products),
        backward=Cost(8 * tensor + places_bytes, 2 * products),
    )


def _bias(inputs: Inputs) -> Tensor | None:
    """[N,H,S,S] in the slopes' dtype."""
    if "positions" not in inputs:
        return None
    places = inputs["positions"]
    distance = (places.unsqueeze(2) - places.unsqueeze(1)).abs()
    distance = distance.masked_fill((places.unsqueeze(2) < 0) | (places.unsqueeze(1) < 0), 0)
    factor = inputs["slopes"] * inputs["alibi_scale"].clamp_min(0)
    return -factor.view(1, -1, 1, 1) * distance.unsqueeze(1)


def _materialised(inputs: Inputs, dropout: float) -> Tensor:
    """As the original: all scores, plus the bias, softmax in fp32, times v."""
    qkv = inputs["qkv"]
    n, s, _, h, d = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    scores = (q * d**-0.5 @ k.transpose(-2, -1)).to(wide)
    bias = _bias(inputs)
    p = (scores if bias is None else scores + bias).softmax(-1)
    if dropout:
        p = p * keep_mask(tuple(p.shape), dropout, qkv.device, _SEED) / (1 - dropout)
    return (p.to(qkv.dtype) @ v).transpose(1, 2).reshape(n, s, h * d)
