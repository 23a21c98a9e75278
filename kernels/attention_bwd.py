"""Backward of multimask_attention: see attention.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.kernels._attention import (
    Call,
    Inputs,
    bias_weight,
    counted,
    keep_scores,
    key_bias,
    load_places,
    load_rows,
    products,
    scores,
    sequence_and_head,
    store_rows,
)
from d2vkern.kernels._attention_tiles import keys_tiles, queries_tiles, short_tiles
from d2vkern.kernels._column_sums import column_sums
from d2vkern.kernels._launch import launch
from d2vkern.kernels.attention_fwd import short_probabilities


@triton.jit(do_not_specialize=["tokens", "dropout_threshold"])
def attention_bwd_kernel_short(
    dqkv_ptr,  # [N, S, 3, H, Dh] or None
    dscale_ptr,  # [N, H up to a multiple of 16] fp32 or None
    dout_ptr,  # [N, S, H, Dh]
    dout_stride_n,
    dout_stride_s,
    qkv_ptr,  # [N, S, 3, H, Dh]
    positions_ptr,  # [N, S] or None
    slopes_ptr,  # [H] or None
    alibi_scale_ptr,  # [H] or None
    lengths_ptr,  # [N] or None
    seed_ptr,  # [] int64, or None
    tokens,
    qkv_stride_n,
    qkv_stride_s,
    qkv_stride_slot,
    positions_stride_n,
    scale,
    dropout_scale,
    dropout_threshold,
    HEADS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ZERO_PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One head of one sequence, S <= BLOCK_S: its probabilities anew, then all gradients."""
    n, h = sequence_and_head(tl.program_id(0), HEADS)
    queries, keys = counted(lengths_ptr, n, tokens, ZERO_PADDED)
    row = tl.arange(0, BLOCK_S)
    scale = tl.full((), scale, tl.float32)
    q_ptr = qkv_ptr + n * qkv_stride_n + h * STRIDE_H
    k_ptr, v_ptr = q_ptr + qkv_stride_slot, q_ptr + 2 * qkv_stride_slot
    do_ptr = dout_ptr + n * dout_stride_n + h * WIDTH
    # [BLOCK_S, BLOCK_D]
    q = load_rows(q_ptr, row, qkv_stride_s, queries, WIDTH, BLOCK_D, LARGE)
    k = load_rows(k_ptr, row, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
    v = load_rows(v_ptr, row, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
    do = load_rows(do_ptr, row, dout_stride_s, queries, WIDTH, BLOCK_D, LARGE)
    # [BLOCK_S, BLOCK_S]
    p, distance = short_probabilities(
        products(
            q, q_ptr, row, qkv_stride_s, queries, k, k_ptr, row, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE
        ),
        row, keys, n, h, positions_ptr, slopes_ptr, alibi_scale_ptr, tokens, positions_stride_n, scale,
    )  # fmt: skip
    dp = products(
        do, do_ptr, row, dout_stride_s, queries, v, v_ptr, row, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE
    )
    kept = p
    factor = 1.0
    if seed_ptr is not None:
        keep = keep_scores(
            n, h, row, 0, tokens, tl.load(seed_ptr), dropout_threshold, HEADS, BLOCK_S, ALIGNED
        )
        factor = tl.full((), dropout_scale, tl.float32)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * factor, 0.0)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    if dscale_ptr is not None:
        dscale = scale_gradient(tl.sum(ds * distance), slopes_ptr, alibi_scale_ptr, h)
        store_partial(dscale_ptr, n, h, dscale, HEADS)
    if dqkv_ptr is not None:
        dq_ptr = dqkv_ptr + (n * tokens * 3 * HEADS + h) * WIDTH
        dv = tl.dot(tl.trans(kept.to(do.dtype)), do, input_precision="ieee") * factor
        store_rows(dq_ptr + 2 * HEADS * WIDTH, row, 3 * HEADS * WIDTH, tokens, dv, WIDTH, BLOCK_D, LARGE)
        ds_low = ds.to(k.dtype)
        dq = tl.dot(ds_low, k, input_precision="ieee") * scale
        store_rows(dq_ptr, row, 3 * HEADS * WIDTH, tokens, dq, WIDTH, BLOCK_D, LARGE)
        dk = tl.dot(tl.trans(ds_low), q, input_precision="ieee") * scale
        store_rows(dq_ptr + HEADS * WIDTH, row, 3 * HEADS * WIDTH, tokens, dk, WIDTH, BLOCK_D, LARGE)


@triton.jit
def scale_gradient(along, slopes_ptr, alibi_scale_ptr, h):
    """Of alibi_scale_h, from the sum of dlogit_ij |pos_i - pos_j|: exactly 0 where the scale is clamped."""
    gradient = -along * tl.load(slopes_ptr + h).to(tl.float32)
    return tl.where(tl.load(alibi_scale_ptr + h) < 0, 0.0, gradient)


@triton.jit
def store_partial(partials_ptr, row, h, value, HEADS: tl.constexpr):
    """One head's in a row of a multiple of 16, to be read 16 bytes at a time: the last head fills it up."""
    WIDTH: tl.constexpr = tl.cdiv(HEADS, 16) * 16
    column = h + tl.arange(0, 16)
    end = tl.where(h == HEADS - 1, WIDTH, h + 1)
    tl.store(partials_ptr + row * WIDTH + column, tl.where(column == h, value, 0.0), mask=column < end)


@triton.jit(do_not_specialize=["tokens", "tiles", "dropout_threshold"])
def attention_bwd_kernel_queries(
    dqkv_ptr,  # [N, S, 3, H, Dh] or None
    dscale_ptr,  # [N * tiles, H up to a multiple of 16] fp32 or None
    delta_ptr,  # [N, H, S] fp32
    dout_ptr,  # [N, S, H, Dh]
    dout_stride_n,
    dout_stride_s,
    out_ptr,  # [N, S, H, Dh]
    lse_ptr,  # [N, H, S] fp32
    tiles,
    qkv_ptr,  # [N, S, 3, H, Dh]
    positions_ptr,  # [N, S] or None
    slopes_ptr,  # [H] or None
    alibi_scale_ptr,  # [H] or None
    lengths_ptr,  # [N] or None
    seed_ptr,  # [] int64, or None
    tokens,
    qkv_stride_n,
    qkv_stride_s,
    qkv_stride_slot,
    positions_stride_n,
    scale,
    dropout_scale,
    dropout_threshold,
    HEADS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ZERO_PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of BLOCK_M queries of one head of one sequence, their delta, their part of dalibi_scale."""
    n, h = sequence_and_head(tl.program_id(0) // tiles, HEADS)
    tile = tl.program_id(0) % tiles
    queries, keys = counted(lengths_ptr, n, tokens, ZERO_PADDED)
    # [BLOCK_M]
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.full((), scale, tl.float32)
    scale2 = scale * 1.4426950408889634
    factor = 1.0 if seed_ptr is None else tl.full((), dropout_scale, tl.float32)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    if positions_ptr is not None:
        positions_ptr += n * positions_stride_n
        place_q, real_q = load_places(positions_ptr, row, tokens, tokens)
        weight = real_q * bias_weight(slopes_ptr, alibi_scale_ptr, h)
    else:
        place_q = None
        weight = None
    q_ptr = qkv_ptr + n * qkv_stride_n + h * STRIDE_H
    k_ptr, v_ptr = q_ptr + qkv_stride_slot, q_ptr + 2 * qkv_stride_slot
    # [BLOCK_M, BLOCK_D]
    q = load_rows(q_ptr, row, qkv_stride_s, queries, WIDTH, BLOCK_D, LARGE)
    do_ptr = dout_ptr + n * dout_stride_n + h * WIDTH
    do = load_rows(do_ptr, row, dout_stride_s, queries, WIDTH, BLOCK_D, LARGE)
    o_ptr = out_ptr + (n * tokens * HEADS + h) * WIDTH
    o = load_rows(o_ptr, row, HEADS * WIDTH, queries, WIDTH, BLOCK_D, LARGE)
    at = (n * HEADS + h) * tokens + row
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=row < queries)
    lse = tl.load(lse_ptr + at, mask=row < queries, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    excess = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    last = tl.where(tile * BLOCK_M < queries, keys, 0)
    for start in range(0, last, BLOCK_N):
        # [BLOCK_N], [BLOCK_N, BLOCK_D]
        key = start + tl.arange(0, BLOCK_N)
        if seed_ptr is not None:  # first, while few registers are taken
            keep = keep_scores(n, h, row, start, tokens, seed, dropout_threshold, HEADS, BLOCK_N, ALIGNED)
        k = load_rows(k_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
        v = load_rows(v_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
        # [BLOCK_M, BLOCK_N]
        qk = products(
            q, q_ptr, row, qkv_stride_s, queries, k, k_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE
        )
        bias = key_bias(key, keys)[None, :]
        s, distance = scores(qk, bias, scale2, place_q, weight, positions_ptr, key, tokens)
        p = tl.exp2(s - lse[:, None])
        dp = products(
            do, do_ptr, row, dout_stride_s, queries, v, v_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE
        )
        if seed_ptr is not None:
            dp = tl.where(keep, dp * factor, 0.0)
        ds = p * (dp - delta[:, None])
        if dscale_ptr is not None:
            along += tl.sum(ds * distance, 1)
            excess += tl.sum(ds, 1)
            mean += tl.sum(p * distance, 1)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    if dscale_ptr is not None:
        # o is rounded, so delta is a little off, by the same amount for all keys, and ds no longer sums to 0.
        # Next to large distances that is more than all other errors; take it out again.
        along = (along - excess * mean) * real_q
        dscale = scale_gradient(tl.sum(along), slopes_ptr, alibi_scale_ptr, h)
        store_partial(dscale_ptr, n * tiles + tile, h, dscale, HEADS)
    if dqkv_ptr is not None:
        dq_ptr = dqkv_ptr + (n * tokens * 3 * HEADS + h) * WIDTH
        store_rows(dq_ptr, row, 3 * HEADS * WIDTH, tokens, dq * scale, WIDTH, BLOCK_D, LARGE)


@triton.jit(do_not_specialize=["tokens", "tiles", "dropout_threshold"])
def attention_bwd_kernel_keys(
    dqkv_ptr,  # [N, S, 3, H, Dh]
    delta_ptr,  # [N, H, S] fp32
    dout_ptr,  # [N, S, H, Dh]
    dout_stride_n,
    dout_stride_s,
    lse_ptr,  # [N, H, S] fp32
    tiles,
    qkv_ptr,  # [N, S, 3, H, Dh]
    positions_ptr,  # [N, S] or None
    slopes_ptr,  # [H] or None
    alibi_scale_ptr,  # [H] or None
    lengths_ptr,  # [N] or None
    seed_ptr,  # [] int64, or None
    tokens,
    qkv_stride_n,
    qkv_stride_s,
    qkv_stride_slot,
    positions_stride_n,
    scale,
    dropout_scale,
    dropout_threshold,
    HEADS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ZERO_PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one head of one sequence, over all of its queries.

    Tiles stand transposed, keys by queries: as first operands of dk and dv they then need not be moved.
    """
    n, h = sequence_and_head(tl.program_id(0) // tiles, HEADS)
    first = tl.program_id(0) % tiles * BLOCK_N
    queries, keys = counted(lengths_ptr, n, tokens, ZERO_PADDED)
    # [BLOCK_N]
    key = first + tl.arange(0, BLOCK_N)
    scale = tl.full((), scale, tl.float32)
    scale2 = scale * 1.4426950408889634
    factor = 1.0 if seed_ptr is None else tl.full((), dropout_scale, tl.float32)
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    if positions_ptr is not None:
        positions_ptr += n * positions_stride_n
        place_k, real_k = load_places(positions_ptr, key, tokens, tokens)
        weight = real_k * bias_weight(slopes_ptr, alibi_scale_ptr, h)
    else:
        place_k = None
        weight = None
    bias = key_bias(key, keys)[:, None]
    q_ptr = qkv_ptr + n * qkv_stride_n + h * STRIDE_H
    k_ptr, v_ptr = q_ptr + qkv_stride_slot, q_ptr + 2 * qkv_stride_slot
    do_ptr = dout_ptr + n * dout_stride_n + h * WIDTH
    # [BLOCK_N, BLOCK_D]
    k = load_rows(k_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
    v = load_rows(v_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    last = tl.where(first < keys, queries, 0)
    for start in range(0, last, BLOCK_M):
        # [BLOCK_M], [BLOCK_M, BLOCK_D]
        row = start + tl.arange(0, BLOCK_M)
        if seed_ptr is not None:  # first, while few registers are taken
            keep = tl.trans(
                keep_scores(n, h, row, first, tokens, seed, dropout_threshold, HEADS, BLOCK_N, ALIGNED)
            )
        q = load_rows(q_ptr, row, qkv_stride_s, queries, WIDTH, BLOCK_D, LARGE)
        do = load_rows(do_ptr, row, dout_stride_s, queries, WIDTH, BLOCK_D, LARGE)
        at = (n * HEADS + h) * tokens + row
        lse = tl.load(lse_ptr + at, mask=row < queries, other=0.0)
        delta = tl.load(delta_ptr + at, mask=row < queries, other=0.0)
        # [BLOCK_N, BLOCK_M]
        kq = products(
            k, k_ptr, key, qkv_stride_s, keys, q, q_ptr, row, qkv_stride_s, queries, WIDTH, BLOCK_D, LARGE
        )
        s, _ = scores(kq, bias, scale2, place_k, weight, positions_ptr, row, tokens)
        p = tl.exp2(s - lse[None, :])
        dp = products(
            v, v_ptr, key, qkv_stride_s, keys, do, do_ptr, row, dout_stride_s, queries, WIDTH, BLOCK_D, LARGE
        )
        kept = p
        if seed_ptr is not None:
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * factor, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk_ptr = dqkv_ptr + (n * tokens * 3 * HEADS + HEADS + h) * WIDTH
    store_rows(dk_ptr, key, 3 * HEADS * WIDTH, tokens, dk * scale, WIDTH, BLOCK_D, LARGE)
    store_rows(dk_ptr + HEADS * WIDTH, key, 3 * HEADS * WIDTH, tokens, dv * factor, WIDTH, BLOCK_D, LARGE)


def backward_outputs(dout: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    alibi_scale, needs = rest[4], rest[-1]
    dqkv = qkv.new_empty(qkv.shape if needs[0] else (0,))
    if alibi_scale is None or not needs[1]:
        return dqkv, qkv.new_empty(0, dtype=torch.float32)
    return dqkv, alibi_scale.new_empty(alibi_scale.shape)


def _bwd_cost(dout: Tensor, qkv: Tensor, out: Tensor | None, lse: Tensor, *rest: Any) -> _costs.Cost:
    return _costs.attention(qkv, rest[0], grad=(True,)).of_backward()


@op_range("attention/bwd/triton", _bwd_cost)
def backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    lse: Tensor,
    positions: Tensor | None,
    slopes: Tensor | None,
    alibi_scale: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    scale: float | None,
    dropout_p: float,
    zero_padded: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of alibi_scale; those that `needs` does not ask for are empty.

    out and lse: the forward's, of what is not short.
    """
    given = Inputs(qkv, positions, slopes, alibi_scale, lengths, seed)
    outputs = backward_outputs(dout, qkv, out, lse, *given[1:], needs)
    dqkv, dscale = (tensor if need else None for tensor, need in zip(outputs, needs, strict=True))
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    call = Call(given, scale, dropout_p, zero_padded, dout)
    partials = None
    if qkv.numel():
        if call.short:
            partials = _short(call, dout, dqkv, dscale)
        else:
            partials = _long(call, dout, out, lse, dqkv, dscale)
    if dscale is not None:
        if partials is None:
            partials = qkv.new_empty((0, dscale.numel()), dtype=torch.float32)
        column_sums(partials, [dscale])
    return outputs


def _partials(call: Call, rows: int, dscale: Tensor | None) -> Tensor | None:
    """[rows, H up to a multiple of 16] fp32: parts of alibi_scale's gradient."""
    if dscale is None:
        return None
    return call.qkv.new_empty((rows, triton.cdiv(call.heads, 16) * 16), dtype=torch.float32)


def _short(call: Call, dout: Tensor, dqkv: Tensor | None, dscale: Tensor | None) -> Tensor | None:
    partials = _partials(call, call.sequences, dscale)
    launch(
        attention_bwd_kernel_short,
        (call.sequences * call.heads,),
        dqkv,
        partials,
        dout,
        *dout.stride()[:2],
        *call.arguments,
        **call.constants,
        **short_tiles(call, "attention_bwd_kernel_short"),
    )
    return partials


def _long(
    call: Call, dout: Tensor, out: Tensor | None, lse: Tensor, dqkv: Tensor | None, dscale: Tensor | None
) -> Tensor | None:
    """Queries first: they leave delta for the keys."""
    programs = call.sequences * call.heads
    config = queries_tiles(call)
    tiles = triton.cdiv(call.tokens, config["BLOCK_M"])
    partials = _partials(call, call.sequences * tiles, dscale)
    delta = lse.new_empty(lse.shape)
    strides = dout.stride()[:2]
    launch(
        attention_bwd_kernel_queries,
        (programs * tiles,),
        dqkv,
        partials,
        delta,
        dout,
        *strides,
        out,
        lse,
        tiles,
        *call.arguments,
        **call.constants,
        **config,
    )
    if dqkv is not None:
        config = keys_tiles(call)
        tiles = triton.cdiv(call.tokens, config["BLOCK_N"])
        launch(
            attention_bwd_kernel_keys,
            (programs * tiles,),
            dqkv,
            delta,
            dout,
            *strides,
            lse,
            tiles,
            *call.arguments,
            **call.constants,
            **config,
        )
    return partials
