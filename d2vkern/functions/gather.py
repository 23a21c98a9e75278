"""gather_tokens and scatter_tokens of a backend's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._derivatives import first_order
from d2vkern._library import Kernel, needed
from d2vkern.reference.philox import split64

if TYPE_CHECKING:
    from d2vkern.ops.masks import MaskPlan

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
_LINEAR = 'backend="eager" has one'


def _gathered(x: Tensor, ids_keep: Tensor, clones: int, extra: Tensor | None, *_: Tensor | None) -> Tensor:
    rows, kept = ids_keep.shape
    return x.new_empty((rows, kept if extra is None else extra.shape[0] + kept, x.shape[2]))


def _gradients(dout: Tensor, slot: Tensor, clones: int, extras: int, needs: list[bool]) -> Gradients:
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
    x: Tensor,
    slot: Tensor,
    extras: int,
    noise_std: float,
    seed: Tensor | None,
    words: list[int],
    mask_token: Tensor | None = None,
    keep_extra: bool = False,
) -> Tensor:
    rows, tokens = slot.shape
    return x.new_empty((rows, tokens + extras if keep_extra else tokens, x.shape[2]))


def _unscattered(dout: Tensor, ids_keep: Tensor, extras: int, dextra: Tensor | None = None) -> Tensor:
    rows, kept = ids_keep.shape
    return dout.new_empty((rows, extras + kept, dout.shape[2]))


GATHER_FWD = Kernel(
    "gather_fwd(Tensor x, Tensor ids_keep, SymInt clones, Tensor? extra, Tensor? positions, "
    "Tensor? per_mask) -> Tensor",
    "gather/fwd",
    _gathered,
    _costs.gather,
)
GATHER_BWD = Kernel(
    "gather_bwd(Tensor dout, Tensor slot, SymInt clones, SymInt extras, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "gather/bwd",
    _gradients,
    _costs.gather_bwd,
)
SCATTER_FWD = Kernel(
    "scatter_fwd(Tensor x, Tensor slot, SymInt extras, float noise_std, Tensor? seed, SymInt[] words, "
    "Tensor? mask_token=None, bool keep_extra=False) -> Tensor",
    "scatter/fwd",
    _scattered,
    lambda x, slot, extras, *_: _costs.scatter(x, x.shape[1] - extras, slot.shape[1]),
)
SCATTER_BWD = Kernel(
    "scatter_bwd(Tensor dout, Tensor ids_keep, SymInt extras, Tensor? dextra=None) -> Tensor",
    "scatter/bwd",
    _unscattered,
    lambda dout, ids_keep, extras, *_: _costs.scatter_bwd(dout, ids_keep, extras),
)
"""dout: [N, T, D]; dextra: [N, E, D], what the extra tokens get, None: 0"""
MASK_TOKEN_BWD = Kernel(
    "mask_token_bwd(Tensor dout, Tensor slot) -> Tensor",
    "mask_token/bwd",
    lambda dout, slot: dout.new_empty((dout.shape[2],)),
    _costs.mask_token_bwd,
)
"""[D]: the sum of dout [N, T, D] over the masked places"""


def gather_with(forward: Callable[..., Tensor], backward: Callable[..., Gradients]) -> Callable[..., Tensor]:
    """gather_tokens of kernels called as GATHER_FWD and GATHER_BWD; `slot` is saved."""

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
            return forward(x, ids_keep, clones, extra, positions, per_mask)

        @staticmethod
        @first_order("gather_tokens", _LINEAR)
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
            (slot,) = ctx.saved_tensors
            x, _, _, _, extra, positions, per_mask = ctx.needs_input_grad
            needs = [x, extra, positions, per_mask]
            dx, *rest = needed(backward(dout, slot, ctx.clones, ctx.extras, needs), needs)
            return dx, None, None, None, *rest

    def gather_tokens(
        x: Tensor, plan: MaskPlan, extra: Tensor | None, positions: Tensor | None, per_mask: Tensor | None
    ) -> Tensor:
        return _Gather.apply(x, plan.ids_keep, plan.slot, plan.clones, extra, positions, per_mask)

    return gather_tokens


def scatter_with(
    forward: Callable[..., Tensor], backward: Callable[..., Tensor], token_backward: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """scatter_tokens of kernels called as SCATTER_FWD, SCATTER_BWD and MASK_TOKEN_BWD."""

    class _Scatter(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            mask_token: Tensor | None,
            ids_keep: Tensor,
            slot: Tensor,
            noise_std: float,
            seed: int | Tensor,
            keep_extra: bool,
        ) -> Tensor:
            ctx.save_for_backward(ids_keep, None if mask_token is None else slot)
            ctx.extras, ctx.keep_extra = x.shape[1] - ids_keep.shape[1], keep_extra
            number, words = (seed.to(x.device), [0, 0]) if isinstance(seed, Tensor) else (None, split64(seed))
            return forward(x, slot, ctx.extras, noise_std, number, words, mask_token, keep_extra)

        @staticmethod
        @first_order("scatter_tokens", _LINEAR)
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
            ids_keep, slot = ctx.saved_tensors
            dextra = dout[:, : ctx.extras] if ctx.keep_extra else None
            if ctx.keep_extra:
                dout = dout[:, ctx.extras :]
            dx = dtoken = None
            if ctx.needs_input_grad[0]:
                dx = backward(dout, ids_keep, ctx.extras, dextra)
            if ctx.needs_input_grad[1]:
                dtoken = token_backward(dout, slot)
            return dx, dtoken, None, None, None, None, None

    def scatter_tokens(
        x: Tensor,
        plan: MaskPlan,
        noise_std: float,
        seed: int | Tensor,
        mask_token: Tensor | None = None,
        keep_extra: bool = False,
    ) -> Tensor:
        return _Scatter.apply(x, mask_token, plan.ids_keep, plan.slot, noise_std, seed, keep_extra)

    return scatter_tokens
