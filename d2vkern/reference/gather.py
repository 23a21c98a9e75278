"""Eager gather and scatter: between the unrepeated tokens [B, T, D] and the kept tokens [N, E + K, D].

Both are linear, so their backward passes are the transposed copies, written out. Gathering is one
`index_select` from the unrepeated input; no [N, T, D] copy of it exists in either direction. The gradient of
x sums over a sample's M rows in the order m = 0 .. M - 1, in fp32 for low-precision inputs; the positions of
one row are distinct, so each of those steps adds at most once to a place and the result is bitwise
repeatable.
"""

# B samples, M clones per sample, N = B * M rows, T tokens, K kept, E extra tokens, S = E + K, D width

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.reference._common import sum_dtype
from d2vkern.reference.philox import element_normals

if TYPE_CHECKING:
    from d2vkern.ops.masks import MaskPlan

NOISE_CHUNK = 32768
"""Philox counters worked on at once, per CPU thread (their words stay in a core's L2 cache) or GPU unit"""


def gather_tokens(
    x: Tensor, plan: MaskPlan, extra: Tensor | None, positions: Tensor | None, per_mask: Tensor | None
) -> Tensor:
    """Kept tokens of each masked version, extra tokens in front: [N, E + K, D]."""
    return _Gather.apply(x, plan.ids_keep, plan.clones, extra, positions, per_mask)


def scatter_tokens(x: Tensor, plan: MaskPlan, noise_std: float, seed: int | Tensor) -> Tensor:
    """Kept tokens back at their places, N(0, noise_std) at the masked ones: [N, T, D]."""
    ids_mask = plan.ids_mask if noise_std > 0 else None
    return _Scatter.apply(x, plan.ids_keep, plan.clones, plan.tokens, ids_mask, noise_std, seed)


class _Gather(torch.autograd.Function):
    @staticmethod
    @op_range("gather/fwd/eager", _costs.gather)
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        ids_NK: Tensor,
        clones: int,
        extra_ED: Tensor | None,
        positions_TD: Tensor | None,
        per_mask_NTD: Tensor | None,
    ) -> Tensor:
        extras = 0 if extra_ED is None else extra_ED.shape[0]
        ctx.save_for_backward(ids_NK)
        ctx.clones, ctx.extras, ctx.x_shape = clones, extras, x_BTD.shape
        B, T, D = x_BTD.shape
        N, K = ids_NK.shape
        source = x_BTD if positions_TD is None else x_BTD + positions_TD
        sample_N = torch.arange(N, device=ids_NK.device) // clones
        # Extra tokens read a dummy row first: one index_select then writes the whole output.
        ids_NS = pad(ids_NK, (extras, 0))
        out = source.reshape(B * T, D).index_select(0, _flat(ids_NS, sample_N, T))
        out_NSD = out.view(N, extras + K, D)
        if extra_ED is not None:
            out_NSD[:, :extras] = extra_ED
        if per_mask_NTD is not None:
            for part, flat in _parts(ids_NK, clones, T):
                picked = per_mask_NTD[part].reshape(B * T, D).index_select(0, flat)
                out_NSD[part, extras:] += picked.view(B, K, D)
        return out_NSD

    @staticmethod
    @op_range("gather/bwd/eager")
    def backward(ctx: Any, dout_NSD: Tensor) -> tuple[Tensor | None, ...]:
        (ids_NK,) = ctx.saved_tensors
        clones, extras = ctx.clones, ctx.extras
        B, T, D = ctx.x_shape
        need_x, _, _, need_extra, need_positions, need_per_mask = ctx.needs_input_grad
        dx = dextra = dpositions = dper_mask = None
        if need_x or need_positions:
            sum_BTD = _sum_clones(dout_NSD[:, extras:], ids_NK, clones, T)
            dx = sum_BTD.to(dout_NSD.dtype) if need_x else None
            dpositions = sum_BTD.sum(0).to(dout_NSD.dtype) if need_positions else None
        if need_extra:
            dextra = dout_NSD[:, :extras].sum(0, dtype=sum_dtype(dout_NSD.dtype)).to(dout_NSD.dtype)
        if need_per_mask:
            dper_mask = dout_NSD.new_zeros(B * clones, T, D)
            for part, flat in _parts(ids_NK, clones, T):
                dkept = dout_NSD[part, extras:].flatten(0, 1)
                dper_mask[part].view(B * T, D).index_copy_(0, flat, dkept)
        return dx, None, None, dextra, dpositions, dper_mask


class _Scatter(torch.autograd.Function):
    @staticmethod
    @op_range(
        "scatter/fwd/eager",
        lambda x, ids, clones, tokens, *_, grad: _costs.scatter(x, ids.shape[1], tokens),
    )
    def forward(
        ctx: Any,
        x_NSD: Tensor,
        ids_NK: Tensor,
        clones: int,
        tokens: int,
        ids_mask_NU: Tensor | None,
        noise_std: float,
        seed: int | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(ids_NK)
        ctx.extras = x_NSD.shape[1] - ids_NK.shape[1]
        N, _, D = x_NSD.shape
        shape = (N, tokens, D)
        out_NTD = x_NSD.new_zeros(shape) if ids_mask_NU is None else x_NSD.new_empty(shape)
        for part, flat in _parts(ids_NK, clones, tokens):
            out_NTD[part].flatten(0, 1).index_copy_(0, flat, x_NSD[part, ctx.extras :].flatten(0, 1))
        if ids_mask_NU is not None:
            _write_noise(out_NTD.view(N * tokens, D), ids_mask_NU, tokens, noise_std, seed)
        return out_NTD

    @staticmethod
    @op_range("scatter/bwd/eager")
    def backward(ctx: Any, dout_NTD: Tensor) -> tuple[Tensor | None, ...]:
        (ids_NK,) = ctx.saved_tensors
        N, T, D = dout_NTD.shape
        row_N = torch.arange(N, device=ids_NK.device)
        ids_NS = pad(ids_NK, (ctx.extras, 0))
        dx = dout_NTD.reshape(N * T, D).index_select(0, _flat(ids_NS, row_N, T))
        dx_NSD = dx.view(N, ids_NS.shape[1], D)
        dx_NSD[:, : ctx.extras] = 0
        return dx_NSD, None, None, None, None, None, None


def _sum_clones(dkept_NKD: Tensor, ids_NK: Tensor, clones: int, tokens: int) -> Tensor:
    """[B, T, D] in fp32 (fp64 for fp64): per token the sum over the clones that keep it, in clone order."""
    N, K, D = dkept_NKD.shape
    B = N // clones
    total = dkept_NKD.new_zeros(B * tokens, D, dtype=sum_dtype(dkept_NKD.dtype))
    sample_B = torch.arange(B, device=ids_NK.device)
    dkept_BMKD, ids_BMK = dkept_NKD.unflatten(0, (B, clones)), ids_NK.unflatten(0, (B, clones))
    for m in range(clones):
        flat = _flat(ids_BMK[:, m], sample_B, tokens)
        total.index_add_(0, flat, dkept_BMKD[:, m].reshape(B * K, D).to(total.dtype))
    return total.view(B, tokens, D)


def _write_noise(out: Tensor, ids_mask_NU: Tensor, tokens: int, noise_std: float, seed: int | Tensor) -> None:
    """Fill the masked rows of `out` [N * T, D] with N(0, noise_std), chunk by chunk."""
    token = ids_mask_NU.flatten().long()
    row = torch.arange(ids_mask_NU.shape[0], device=out.device).repeat_interleave(ids_mask_NU.shape[1])
    width = out.shape[1]
    chunk = token.numel()
    if not torch.compiler.is_compiling():  # a compiler fuses the generator, there is nothing to keep small
        units = torch.get_num_threads() if out.device.type == "cpu" else 128
        chunk = NOISE_CHUNK * units * 4 // max(width, 1)
    chunk = max(chunk, 1)
    for rows, cols in zip(row.split(chunk), token.split(chunk), strict=True):
        noise = element_normals(rows, cols, width, seed=seed).mul_(noise_std)
        out.index_copy_(0, rows * tokens + cols, noise.to(out.dtype))


def _flat(ids: Tensor, owner: Tensor, tokens: int) -> Tensor:
    """Row numbers in a [owners * T, D] view, int64, flattened: token ids[i, j] of owner[i]."""
    return (ids + owner[:, None] * tokens).flatten()


def _parts(ids_NK: Tensor, clones: int, tokens: int) -> list[tuple[slice, Tensor]]:
    """The N rows in `clones` parts of B: each part with its row numbers in a [B * T, D] view of its own.

    What is copied part by part needs a temporary of 1 / M of the whole.
    """
    B = ids_NK.shape[0] // clones
    local = torch.arange(B, device=ids_NK.device)
    slices = [slice(i * B, (i + 1) * B) for i in range(clones)]
    return [(part, _flat(ids_NK[part], local, tokens)) for part in slices]
