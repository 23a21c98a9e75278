"""Gather and scatter of tokens by the compiled extension: csrc/gather.cpp on CPUs, csrc/gather.cu on CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2vkern import _costs, _native
from d2vkern._nvtx import op_range
from d2vkern.reference.philox import split64

if TYPE_CHECKING:
    from d2vkern.ops.masks import MaskPlan


def _gathered(
    x: Tensor,
    ids_keep: Tensor,
    clones: int,
    extra: Tensor | None,
    positions: Tensor | None,
    per_mask: Tensor | None,
) -> Tensor:
    rows, kept = ids_keep.shape
    return x.new_empty((rows, kept if extra is None else extra.shape[0] + kept, x.shape[2]))


def _gradients(
    dout: Tensor, slot: Tensor, clones: int, extras: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x, extra, positions and per_mask; empty where none is needed."""
    (rows, tokens), width = slot.shape, dout.shape[2]
    x, extra, positions, per_mask = needs
    return (
        dout.new_empty((rows // clones if x else 0, tokens, width)),
        dout.new_empty((extras if extra else 0, width)),
        dout.new_empty((tokens if positions else 0, width)),
        dout.new_empty((rows if per_mask else 0, tokens, width)),
    )


def _scattered(
    x: Tensor, slot: Tensor, extras: int, noise_std: float, seed: Tensor | None, words: list[int]
) -> Tensor:
    return x.new_empty((*slot.shape, x.shape[2]))


def _unscattered(dout: Tensor, ids_keep: Tensor, extras: int) -> Tensor:
    rows, kept = ids_keep.shape
    return dout.new_empty((rows, extras + kept, dout.shape[2]))


_gather_fwd = _native.op("gather_fwd", _gathered)
_gather_bwd = _native.op("gather_bwd", _gradients)
_scatter_fwd = _native.op("scatter_fwd", _scattered)
_scatter_bwd = _native.op("scatter_bwd", _unscattered)


def gather_tokens(
    x: Tensor, plan: MaskPlan, extra: Tensor | None, positions: Tensor | None, per_mask: Tensor | None
) -> Tensor:
    """Kept tokens of each masked version, extra tokens in front: [N, E + K, D]."""
    return _Gather.apply(x, plan.ids_keep, plan.clones, extra, positions, per_mask, plan.slot)


def scatter_tokens(x: Tensor, plan: MaskPlan, noise_std: float, seed: int | Tensor) -> Tensor:
    """Kept tokens back at their places, N(0, noise_std) at the masked ones: [N, T, D]."""
    return _Scatter.apply(x, plan.ids_keep, plan.clones, plan.tokens, plan.slot, noise_std, seed)


def _gather_cost(
    x: Tensor,
    ids_keep: Tensor,
    clones: int,
    extra: Tensor | None,
    positions: Tensor | None,
    per_mask: Tensor | None,
    slot: Tensor,
    grad: tuple[bool, ...],
) -> _costs.Cost:
    return _costs.gather(x, ids_keep, clones, extra, positions, per_mask, grad=grad)


class _Gather(torch.autograd.Function):
    @staticmethod
    @op_range("gather/fwd/native", _gather_cost)
    def forward(
        ctx: Any,
        x: Tensor,
        ids_keep: Tensor,
        clones: int,
        extra: Tensor | None,
        positions: Tensor | None,
        per_mask: Tensor | None,
        slot: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.clones, ctx.extras = clones, 0 if extra is None else extra.shape[0]
        return _gather_fwd(x, ids_keep, clones, extra, positions, per_mask)

    @staticmethod
    @once_differentiable
    @op_range("gather/bwd/native")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        x, _, _, extra, positions, per_mask, _ = ctx.needs_input_grad
        needs = [x, extra, positions, per_mask]
        grads = _gather_bwd(dout, slot, ctx.clones, ctx.extras, needs)
        dx, *rest = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return dx, None, None, *rest, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    @op_range("scatter/fwd/native", _costs.scatter)
    def forward(
        ctx: Any,
        x: Tensor,
        ids_keep: Tensor,
        clones: int,
        tokens: int,
        slot: Tensor,
        noise_std: float,
        seed: int | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(ids_keep)
        ctx.extras = x.shape[1] - ids_keep.shape[1]
        if isinstance(seed, Tensor):
            return _scatter_fwd(x, slot, ctx.extras, noise_std, seed.to(x.device), [0, 0])
        return _scatter_fwd(x, slot, ctx.extras, noise_std, None, split64(seed))

    @staticmethod
    @once_differentiable
    @op_range("scatter/bwd/native")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (ids_keep,) = ctx.saved_tensors
        return _scatter_bwd(dout, ids_keep, ctx.extras), None, None, None, None, None, None
