"""Gather of the kept tokens and scatter for the decoder, against repeating every sample M times first."""

from __future__ import annotations

import torch
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Shapes, Size, normal, shapes
from d2v.config.fronts import ImageFront, TextFront
from d2vkern.reference.philox import element_normals

_SEED = 7


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """Student input and decoder input."""
    s = shapes(preset, size)
    return [_gather(s, dtype), _scatter(s, dtype)]


def _gather(s: Shapes, dtype: torch.dtype) -> Case:
    d, e = s.cfg.dim, dtype.itemsize
    speech = not isinstance(s.cfg.front, (ImageFront, TextFront))
    positions = isinstance(s.cfg.front, ImageFront)

    def make(device: torch.device) -> Inputs:
        inputs = {"plan": s.random_plan(device), "x": normal(device, s.batch, s.tokens, d, dtype=dtype)}
        if s.extra:
            inputs["extra"] = normal(device, s.extra, d, dtype=dtype)
        if positions:
            inputs["positions"] = normal(device, s.tokens, d, dtype=dtype)
        if speech:
            inputs["per_mask"] = normal(device, s.rows, s.tokens, d, dtype=dtype)
        return inputs

    def call(inputs: Inputs, backend: str | None) -> Tensor:
        return d2vkern.gather_tokens(**inputs, backend=backend)

    leaves = ("x", *(["extra"] if s.extra else []), *(["per_mask"] if speech else []))
    kept, seen = s.rows * s.kept * d * e, s.rows * s.seen * d * e
    source = s.batch * s.tokens * d * e
    added = (s.extra + s.tokens * positions) * d * e + kept * speech
    return Case(
        op="gather_tokens",
        name="student input",
        preset=s.preset,
        shape=f"B{s.batch} M{s.clones} T{s.tokens} K{s.kept} D{d}",
        dtype=dtype,
        make=make,
        call=call,
        plain=_repeat_then_pick,
        leaves=leaves,
        forward=Cost(source + seen + added + s.rows * s.kept * 4, 0),
        backward=Cost(seen + source + s.rows * s.tokens * (4 + d * e * speech), 0),
        # the gradient of extra tokens sums all rows, in whatever order suits a backend
        bitwise=frozenset({"out", "grad x", "grad per_mask"}),
    )


def _repeat_then_pick(inputs: Inputs) -> Tensor:
    """What the original does: repeat, add, then gather."""
    plan, x = inputs["plan"], inputs["x"]
    if "positions" in inputs:
        x = x + inputs["positions"]
    x = x.repeat_interleave(plan.clones, 0)
    if "per_mask" in inputs:
        x = x + inputs["per_mask"]
    kept = x.gather(1, plan.ids_keep.long().unsqueeze(2).expand(-1, -1, x.shape[2]))
    if "extra" in inputs:
        kept = torch.cat([inputs["extra"].expand(kept.shape[0], -1, -1), kept], 1)
    return kept


def _scatter(s: Shapes, dtype: torch.dtype) -> Case:
    d, e, std = s.cfg.dim, dtype.itemsize, s.cfg.decoder.noise_std

    def make(device: torch.device) -> Inputs:
        return {"plan": s.random_plan(device), "x": normal(device, s.rows, s.seen, d, dtype=dtype)}

    def call(inputs: Inputs, backend: str | None) -> Tensor:
        return d2vkern.scatter_tokens(inputs["x"], inputs["plan"], std, _SEED, backend=backend)

    def plain(inputs: Inputs) -> Tensor:
        plan, x = inputs["plan"], inputs["x"]
        row, token = plan.mask.nonzero(as_tuple=True)
        noise = element_normals(row, token, d, seed=_SEED).to(x.dtype) * std
        out = x.new_zeros(s.rows, s.tokens, d).index_put((row, token), noise)
        index = plan.ids_keep.long().unsqueeze(2).expand(-1, -1, d)
        return out.scatter(1, index, x[:, s.extra :])

    def observe(inputs: Inputs, results: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs["plan"].mask
        return {"kept": results["out"][~mask], "noise": results["out"][mask], "grad x": results["grad x"]}

    seen, grid = s.rows * s.seen * d * e, s.rows * s.tokens * d * e
    return Case(
        op="scatter_tokens",
        name="decoder input",
        preset=s.preset,
        shape=f"N{s.rows} T{s.tokens} K{s.kept} D{d}",
        dtype=dtype,
        make=make,
        call=call,
        plain=plain,
        leaves=("x",),
        forward=Cost(seen + grid + s.rows * s.tokens * 4, 0),
        backward=Cost(2 * seen + s.rows * s.kept * 4, 0),
        bitwise=frozenset({"kept", "grad x"}),
        observe=observe,
    )
