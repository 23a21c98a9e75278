"""Masks of a batch by (seed, epoch, sample id, clone): bound by integer draws, not by the bytes counted."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Shapes, Size, shapes
from d2v.config.fronts import ImageFront, TextFront
from d2vkern.reference.philox import CENTRES, PRIORITIES, below, row_draws

_SEED = 1


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """The preset's sampler. It has no floating-point side: `dtype` only names the row."""
    s = shapes(preset, size)
    front = s.cfg.front
    name = "inverse_block_mask" if isinstance(front, ImageFront) else "span_mask"

    def make(device: torch.device) -> Inputs:
        return {"ids": torch.randint(2**40, (s.batch,)).to(device)}

    def call(inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
        plan = s.plan(inputs["ids"], _SEED, backend)
        return {"mask": plan.mask, "ids_keep": plan.ids_keep, "slot": plan.slot}

    return [
        Case(
            op="random_mask" if isinstance(front, TextFront) else name,
            name="masks",
            preset=preset,
            shape=f"B{s.batch} M{s.clones} T{s.tokens} K{s.kept}",
            dtype=dtype,
            make=make,
            call=call,
            plain=lambda inputs: _by_sorting(s, inputs["ids"]),
            forward=Cost(8 * s.batch + s.rows * (5 * s.tokens + 4 * s.kept), 0),
        )
    ]


def _by_sorting(s: Shapes, ids: Tensor) -> dict[str, Tensor]:
    """The same masks the straightforward way: a full sort of (marked first, priority, place) per row."""
    mask, front, tokens = s.cfg.mask, s.cfg.front, s.tokens
    wanted = int(tokens * mask.prob) if s.cfg.modality == "audio" else s.kept
    marked = torch.zeros(s.rows, tokens, dtype=torch.bool, device=ids.device)
    row = torch.arange(s.rows, device=ids.device)
    reach = range(-(mask.length // 2), mask.length - mask.length // 2)
    if isinstance(front, ImageFront):
        height, width = front.grid
        count = int(tokens * ((1.0 - mask.prob + mask.adjust) / mask.length**2))
        for centre in below(row_draws(ids, s.clones, count, CENTRES, seed=_SEED, epoch=0), tokens).unbind(1):
            for up in reach:
                for left in reach:
                    y, x = centre // width + up, centre % width + left
                    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                    marked[row[inside], (y * width + x)[inside]] = True
    elif not isinstance(front, TextFront):
        count = int(tokens * ((mask.prob + mask.adjust) / mask.length))
        for centre in below(row_draws(ids, s.clones, count, CENTRES, seed=_SEED, epoch=0), tokens).unbind(1):
            for shift in reach:
                inside = (centre + shift >= 0) & (centre + shift < tokens)
                marked[row[inside], (centre + shift)[inside]] = True
    priority = row_draws(ids, s.clones, tokens, PRIORITIES, seed=_SEED, epoch=0)
    by_priority = priority.argsort(dim=1, stable=True)
    unmarked = (~marked).gather(1, by_priority).long()
    order = by_priority.gather(1, unmarked.argsort(dim=1, stable=True))
    chosen = torch.zeros_like(marked).scatter_(1, order[:, :wanted], True)
    masked = chosen if s.cfg.modality == "audio" else ~chosen
    ids_keep = (~masked).nonzero()[:, 1].view(s.rows, s.kept)
    slot = torch.full((s.rows, tokens), -1, dtype=torch.int32, device=ids.device)
    slot.scatter_(1, ids_keep, torch.arange(s.kept, dtype=torch.int32, device=ids.device).expand(s.rows, -1))
    return {"mask": masked, "ids_keep": ids_keep.int(), "slot": slot}
