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
    padding = None if plan.kept_lengths is None else plan.ids_keep < 0
    return _Gather.apply(x, plan.ids_keep, plan.clones, extra, positions, per_mask, padding)


def scatter_tokens(
    x: Tensor,
    plan: MaskPlan,
    noise_std: float,
    seed: int | Tensor,
    mask_token: Tensor | None = None,
    keep_extra: bool = False,
) -> Tensor:
    """Kept tokens back at their places, N(0, noise_std) or `mask_token` at the masked ones: [N, T, D].

    keep_extra: the extra tokens in front: [N, E + T, D].
    """
    ids_mask = plan.ids_mask if noise_std > 0 else None
    padded = plan.kept_lengths is not None
    return _Scatter.apply(
        x, plan.ids_keep, plan.clones, plan.mask, padded, ids_mask, noise_std, seed, mask_token, keep_extra
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    @op_range(
        "gather/fwd/eager",
        lambda x, ids, clones, extra, places, own, *_, grad: _costs.gather(
            x, ids, clones, extra, places, own, grad
        ),
    )
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        ids_NK: Tensor,
        clones: int,
        extra_ED: Tensor | None,
        positions_TD: Tensor | None,
        per_mask_NTD: Tensor | None,
        padding_NK: Tensor | None,
    ) -> Tensor:
        extras = 0 if extra_ED is None else extra_ED.shape[0]
        ctx.save_for_backward(ids_NK, padding_NK)
        ctx.clones, ctx.extras, ctx.x_shape = clones, extras, x_BTD.shape
        B, T, D = x_BTD.shape
        N, K = ids_NK.shape
        ids_NK = _within(ids_NK, padding_NK)
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
        if padding_NK is not None:
            out_NSD[:, extras:].masked_fill_(padding_NK[..., None], 0.0)
        return out_NSD

    @staticmethod
    @op_range("gather/bwd/eager")
    def backward(ctx: Any, dout_NSD: Tensor) -> tuple[Tensor | None, ...]:
        ids_NK, padding_NK = ctx.saved_tensors
        clones, extras = ctx.clones, ctx.extras
        B, T, D = ctx.x_shape
        need_x, _, _, need_extra, need_positions, need_per_mask, _ = ctx.needs_input_grad
        dx = dextra = dpositions = dper_mask = None
        dkept_NKD = dout_NSD[:, extras:]
        if need_x or need_positions:
            sum_BTD = _sum_clones(dkept_NKD, ids_NK, padding_NK, clones, T)
            dx = sum_BTD.to(dout_NSD.dtype) if need_x else None
            dpositions = sum_BTD.sum(0).to(dout_NSD.dtype) if need_positions else None
        if need_extra:
            dextra = dout_NSD[:, :extras].sum(0, dtype=sum_dtype(dout_NSD.dtype)).to(dout_NSD.dtype)
        if need_per_mask:
            placed = _place(dkept_NKD, ids_NK, clones, T, padding_NK is not None)
            dper_mask = placed[: B * clones * T].view(B * clones, T, D)
        return dx, None, None, dextra, dpositions, dper_mask, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    @op_range(
        "scatter/fwd/eager",
        lambda x, ids, clones, mask, *_, grad: _costs.scatter(x, ids.shape[1], mask.shape[1]),
    )
    def forward(
        ctx: Any,
        x_NSD: Tensor,
        ids_NK: Tensor,
        clones: int,
        mask_NT: Tensor,
        padded: bool,
        ids_mask_NU: Tensor | None,
        noise_std: float,
        seed: int | Tensor,
        token_D: Tensor | None,
        keep_extra: bool,
    ) -> Tensor:
        ctx.save_for_backward(ids_NK, mask_NT if token_D is not None else None)
        ctx.extras = extras = x_NSD.shape[1] - ids_NK.shape[1]
        ctx.padded, ctx.keep_extra, ctx.clones = padded, keep_extra, clones
        N, _, D = x_NSD.shape
        front = extras if keep_extra else 0
        length = front + mask_NT.shape[1]
        fill = 0.0 if ids_mask_NU is None else None
        out = _place(
            x_NSD if keep_extra else x_NSD[:, extras:],
            _behind(ids_NK, front),
            clones,
            length,
            padded,
            fill if token_D is None else token_D,
        )
        if ids_mask_NU is not None:
            _write_noise(out, ids_mask_NU, front, length, noise_std, seed)
        return out[: N * length].view(N, length, D)

    @staticmethod
    @op_range("scatter/bwd/eager")
    def backward(ctx: Any, dout_NLD: Tensor) -> tuple[Tensor | None, ...]:
        ids_NK, mask_NT = ctx.saved_tensors
        extras = ctx.extras
        front = extras if ctx.keep_extra else 0
        dx = dtoken = None
        if ctx.needs_input_grad[0]:
            N, L, D = dout_NLD.shape
            row_N = torch.arange(N, device=ids_NK.device)
            padding_NK = ids_NK < 0 if ctx.padded else None
            ids_NS = _behind(_within(ids_NK, padding_NK), front)
            ids_NS = pad(ids_NS, (extras - front, 0))
            dx = dout_NLD.reshape(N * L, D).index_select(0, _flat(ids_NS, row_N, L)).view(*ids_NS.shape, D)
            dx[:, : extras - front] = 0
            if padding_NK is not None:
                dx[:, extras:].masked_fill_(padding_NK[..., None], 0.0)
        if mask_NT is not None and ctx.needs_input_grad[8]:
            dtoken = _sum_masked(dout_NLD[:, front:], mask_NT, ctx.clones).to(dout_NLD.dtype)
        return dx, None, None, None, None, None, None, None, dtoken, None


def _sum_clones(
    dkept_NKD: Tensor, ids_NK: Tensor, padding_NK: Tensor | None, clones: int, tokens: int
) -> Tensor:
    """[B, T, D] in fp32 (fp64 for fp64): per token the sum over the clones that keep it, in clone order."""
    N, K, D = dkept_NKD.shape
    B = N // clones
    total = dkept_NKD.new_zeros(B * tokens, D, dtype=sum_dtype(dkept_NKD.dtype))
    sample_B = torch.arange(B, device=ids_NK.device)
    if padding_NK is not None:  # adds zeros to token 0
        dkept_NKD = dkept_NKD.masked_fill(padding_NK[..., None], 0.0)
        ids_NK = _within(ids_NK, padding_NK)
    dkept_BMKD, ids_BMK = dkept_NKD.unflatten(0, (B, clones)), ids_NK.unflatten(0, (B, clones))
    for m in range(clones):
        flat = _flat(ids_BMK[:, m], sample_B, tokens)
        total.index_add_(0, flat, dkept_BMKD[:, m].reshape(B * K, D).to(total.dtype))
    return total.view(B, tokens, D)


def _sum_masked(dout_NTD: Tensor, mask_NT: Tensor, clones: int) -> Tensor:
    """[D] in fp32 (fp64 for fp64): the sum over all masked places, in `clones` parts to keep copies small."""
    total = dout_NTD.new_zeros(dout_NTD.shape[2], dtype=sum_dtype(dout_NTD.dtype))
    B = mask_NT.shape[0] // clones
    for i in range(clones):
        part = slice(i * B, (i + 1) * B)
        masked = dout_NTD[part].masked_fill(~mask_NT[part, :, None], 0.0)
        total += masked.sum((0, 1), dtype=total.dtype)
    return total


def _place(
    x_NSD: Tensor,
    ids_NS: Tensor,
    clones: int,
    length: int,
    padded: bool,
    fill: float | Tensor | None = 0.0,
) -> Tensor:
    """[N * length, D]: row x[n, s] at place ids[n, s] of its row n, the rest `fill` (None: not written).

    padded: one more row at the end took what has no place.
    """
    N, _, D = x_NSD.shape
    rows = N * length
    out = x_NSD.new_empty(rows + padded, D)
    if fill is not None:
        out.copy_(fill) if isinstance(fill, Tensor) else out.fill_(fill)
    if padded:
        row_N = torch.arange(N, device=ids_NS.device)
        flat = torch.where(ids_NS.flatten() < 0, rows, _flat(ids_NS, row_N, length))
        return out.index_copy_(0, flat, x_NSD.flatten(0, 1))
    out_NLD = out.view(N, length, D)
    for part, flat in _parts(ids_NS, clones, length):
        out_NLD[part].flatten(0, 1).index_copy_(0, flat, x_NSD[part].flatten(0, 1))
    return out


def _write_noise(
    out: Tensor, ids_mask_NU: Tensor, front: int, length: int, noise_std: float, seed: int | Tensor
) -> None:
    """Fill the masked rows of `out` [N * length (+ 1), D] with N(0, noise_std), chunk by chunk.

    Token t of row n is row n * length + front + t; what has no token goes to the last row.
    """
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
        place = torch.where(cols < 0, out.shape[0] - 1, rows * length + front + cols)
        out.index_copy_(0, place, noise.to(out.dtype))


def _within(ids_NK: Tensor, padding_NK: Tensor | None) -> Tensor:
    """The ids with 0 for those of padding, whose values do not count."""
    return ids_NK if padding_NK is None else ids_NK.clamp(min=0)


def _behind(ids_NK: Tensor, front: int) -> Tensor:
    """[N, front + K]: places of `front` tokens, and of the others behind them; -1 stays."""
    if front == 0:
        return ids_NK
    first = torch.arange(front, dtype=ids_NK.dtype, device=ids_NK.device).expand(ids_NK.shape[0], -1)
    return torch.cat([first, torch.where(ids_NK < 0, -1, ids_NK + front)], 1)


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
