"""Triton gather_tokens and scatter_tokens: rows copied once between [B, T, D] and [N, E + K, D], n = b M + m.

    gather     out[n, E + k] = (x[b, t] + positions[t]) + per_mask[n, t],  t = ids_keep[n, k]
               out[n, e] = extra[e]; each sum is rounded to the dtype, where eager rounds it
    backward   with g[n, t] = dout[n, E + slot[n, t]] where slot[n, t] >= 0, else 0:
               dx[b, t] = sum over m of g[n, t], in fp32, in the order m = 0 .. M - 1, rounded once
               dper_mask[n, t] = g[n, t]
               dpositions[t], dextra[e] = sums over n, in fp32, in an order that the shapes alone fix
    scatter    out[n, t] = x[n, E + slot[n, t]] where slot[n, t] >= 0, else noise_std normal(seed, n, t)
    backward   a gather from one version per sample, with 0 for the extra tokens

Layout: contiguous last dimensions and any other strides (what has not is copied first); ids_keep, slot and
all outputs are contiguous.

A program takes a chunk of the columns, 256 where that divides D: a warp moves 512 bytes of a 16-bit row in
16-byte accesses, and no lane is idle at 768, 1024 or 1280.
- gather_fwd_kernel (gather_fwd.py): BLOCK_S rows of one out[n]. The M versions of a sample run next to each
  other, so that x comes from memory once and from the L2 cache M times.
- gather_bwd_kernel_rows (gather_bwd.py): BLOCK_T tokens of one sample, looked up in all M versions: nothing
  is cleared first, no atomics. For dpositions and dextra it goes on to the next samples of its group and
  leaves an fp32 partial sum per group, which a second kernel adds up (_column_sums.py).
- scatter_fwd_kernel (_scatter.py): BLOCK_T tokens of one out[n] by a single warp, one after another. The warp
  copies or draws as a whole, so a kept token costs no normals. One Philox counter makes the normals of four
  neighbouring columns, and a thread makes all that it stores.

Bytes, in rows of D (the floor: _costs.gather, _costs.scatter); ids_keep or slot come once per chunk on top:
    gather     B T + E + T (positions) + N K (per_mask) read, N (E + K) written: the floor
    backward   N (E + K) read, B T (dx) + N T (dper_mask) written: the floor; partial sums: E fp32 rows per
               sample (dextra), T per 4 samples (dpositions), written and read
    scatter    N K read, N T written: less than the floor by the extra tokens, which are not read
    backward   N K read, N (E + K) written: likewise
The noise is bound by arithmetic: a normal takes 42 issue slots (36 instructions of sm_90, 15 of them Philox).
By that count image_base's 31 M normals take an H200 43 us at B = 16, where its bytes take 21.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2vkern._library import define
from d2vkern.kernels import _scatter, gather_bwd, gather_fwd
from d2vkern.reference.philox import split64

if TYPE_CHECKING:
    from d2vkern.ops.masks import MaskPlan

_gather_fwd = define(
    "gather_fwd(Tensor x, Tensor ids_keep, SymInt clones, Tensor? extra, Tensor? positions, "
    "Tensor? per_mask) -> Tensor",
    gather_fwd.forward,
    gather_fwd.forward_output,
)
_gather_bwd = define(
    "gather_bwd(Tensor dout, Tensor slot, SymInt clones, SymInt extras, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    gather_bwd.backward,
    gather_bwd.backward_outputs,
)
_scatter_fwd = define(
    "scatter_fwd(Tensor x, Tensor slot, SymInt extras, float noise_std, Tensor? seed, SymInt[] words) "
    "-> Tensor",
    _scatter.forward,
    _scatter.forward_output,
)
_scatter_bwd = define(
    "scatter_bwd(Tensor dout, Tensor ids_keep, SymInt extras) -> Tensor",
    _scatter.backward,
    _scatter.backward_output,
)


def gather_tokens(
    x: Tensor, plan: MaskPlan, extra: Tensor | None, positions: Tensor | None, per_mask: Tensor | None
) -> Tensor:
    """Kept tokens of each masked version, extra tokens in front: [N, E + K, D]."""
    return _Gather.apply(x, plan.ids_keep, plan.slot, plan.clones, extra, positions, per_mask)


def scatter_tokens(x: Tensor, plan: MaskPlan, noise_std: float, seed: int | Tensor) -> Tensor:
    """Kept tokens back at their places, N(0, noise_std) at the masked ones: [N, T, D]."""
    return _Scatter.apply(x, plan.ids_keep, plan.slot, noise_std, seed)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids_keep: Tensor,
        slot: Tensor,
        clones: int,
        extra: Tensor | None,
        positions: Tensor | None,
        per_mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.clones, ctx.extras = clones, 0 if extra is None else extra.shape[0]
        return _gather_fwd(x, ids_keep, clones, extra, positions, per_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        x, _, _, _, extra, positions, per_mask = ctx.needs_input_grad
        needs = [x, extra, positions, per_mask]
        grads = _gather_bwd(dout, slot, ctx.clones, ctx.extras, needs)
        dx, *rest = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return dx, None, None, None, *rest


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids_keep: Tensor, slot: Tensor, noise_std: float, seed: int | Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids_keep)
        ctx.extras = x.shape[1] - ids_keep.shape[1]
        if isinstance(seed, Tensor):
            return _scatter_fwd(x, slot, ctx.extras, noise_std, seed.to(x.device), [0, 0])
        return _scatter_fwd(x, slot, ctx.extras, noise_std, None, split64(seed))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (ids_keep,) = ctx.saved_tensors
        return _scatter_bwd(dout, ids_keep, ctx.extras), None, None, None, None
