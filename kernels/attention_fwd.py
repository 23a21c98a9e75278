"""Forward of multimask_attention: see attention.py."""

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
    distances,
    is_short,
    keep_scores,
    key_bias,
    load_places,
    load_rows,
    products,
    scores,
    sequence_and_head,
    store_rows,
)
from d2vkern.kernels._attention_tiles import forward_tiles, short_tiles
from d2vkern.kernels._launch import launch


# What changes from batch to batch compiles nothing anew.
@triton.jit(do_not_specialize=["tokens", "dropout_threshold"])
def attention_fwd_kernel_short(
    out_ptr,  # [N, S, H, Dh]
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
    """One head of one sequence, S <= BLOCK_S."""
    n, h = sequence_and_head(tl.program_id(0), HEADS)
    queries, keys = counted(lengths_ptr, n, tokens, ZERO_PADDED)
    row = tl.arange(0, BLOCK_S)
    q_ptr = qkv_ptr + n * qkv_stride_n + h * STRIDE_H
    k_ptr = q_ptr + qkv_stride_slot
    # [BLOCK_S, BLOCK_D]
    q = load_rows(q_ptr, row, qkv_stride_s, queries, WIDTH, BLOCK_D, LARGE)
    k = load_rows(k_ptr, row, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
    v = load_rows(q_ptr + 2 * qkv_stride_slot, row, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
    # [BLOCK_S, BLOCK_S]
    p, _ = short_probabilities(
        products(
            q, q_ptr, row, qkv_stride_s, queries, k, k_ptr, row, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE
        ),
        row, keys, n, h, positions_ptr, slopes_ptr, alibi_scale_ptr, tokens, positions_stride_n, scale,
    )  # fmt: skip
    factor = 1.0
    if seed_ptr is not None:
        keep = keep_scores(
            n, h, row, 0, tokens, tl.load(seed_ptr), dropout_threshold, HEADS, BLOCK_S, ALIGNED
        )
        p = tl.where(keep, p, 0.0)
        factor = tl.full((), dropout_scale, tl.float32)
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee") * factor
    if ZERO_PADDED:
        o = tl.where((row < queries)[:, None], o, 0.0)
    out_row_ptr = out_ptr + (n * tokens * HEADS + h) * WIDTH
    store_rows(out_row_ptr, row, HEADS * WIDTH, tokens, o, WIDTH, BLOCK_D, LARGE)


@triton.jit
def short_probabilities(
    qk,
    row,
    keys,
    n,
    h,
    positions_ptr,
    slopes_ptr,
    alibi_scale_ptr,
    tokens,
    positions_stride_n,
    scale,
):
    """softmax of a whole sequence's scores, and the distances masked by both tokens (0 without slopes)."""
    scale = tl.full((), scale, tl.float32) * 1.4426950408889634
    s = qk * scale + key_bias(row, keys)[None, :]
    distance = tl.zeros_like(s)
    if positions_ptr is not None:
        place, real = load_places(positions_ptr + n * positions_stride_n, row, tokens, tokens)
        distance = distances(place[:, None], place[None, :], real[None, :]) * real[:, None]
        s -= distance * bias_weight(slopes_ptr, alibi_scale_ptr, h)
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * tl.div_rn(1.0, tl.sum(p, 1))[:, None], distance


@triton.jit(do_not_specialize=["tokens", "tiles", "dropout_threshold"])
def attention_fwd_kernel(
    out_ptr,  # [N, S, H, Dh]
    lse_ptr,  # [N, H, S] fp32, base 2, or None
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
    """BLOCK_M queries of one head of one sequence, over all of its keys."""
    n, h = sequence_and_head(tl.program_id(0) // tiles, HEADS)
    queries, keys = counted(lengths_ptr, n, tokens, ZERO_PADDED)
    # [BLOCK_M]
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.full((), scale, tl.float32) * 1.4426950408889634
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
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    last = tl.where(tl.program_id(0) % tiles * BLOCK_M < queries, keys, 0)
    for start in range(0, last, BLOCK_N):
        # [BLOCK_N], [BLOCK_N, BLOCK_D]
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
        # [BLOCK_M, BLOCK_N]
        qk = products(
            q, q_ptr, row, qkv_stride_s, queries, k, k_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE
        )
        bias = key_bias(key, keys)[None, :]
        s, _ = scores(qk, bias, scale, place_q, weight, positions_ptr, key, tokens)
        larger = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - larger[:, None])
        shrink = tl.exp2(most - larger)
        most = larger
        total = total * shrink + tl.sum(p, 1)
        if seed_ptr is not None:
            keep = keep_scores(n, h, row, start, tokens, seed, dropout_threshold, HEADS, BLOCK_N, ALIGNED)
            p = tl.where(keep, p, 0.0)
        v = load_rows(v_ptr, key, qkv_stride_s, keys, WIDTH, BLOCK_D, LARGE)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    total = tl.where(total == 0.0, 1.0, total)  # of padded queries
    factor = 1.0 if seed_ptr is None else tl.full((), dropout_scale, tl.float32)
    o *= (factor / total)[:, None]
    if ZERO_PADDED:
        o = tl.where((row < queries)[:, None], o, 0.0)
    out_row_ptr = out_ptr + (n * tokens * HEADS + h) * WIDTH
    store_rows(out_row_ptr, row, HEADS * WIDTH, tokens, o, WIDTH, BLOCK_D, LARGE)
    if lse_ptr is not None:
        lse = tl.where(row < queries, most + tl.log2(total), 0.0)
        tl.store(lse_ptr + (n * HEADS + h) * tokens + row, lse, mask=row < tokens)


def forward_outputs(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, save = rest
    n, s, _, heads, width = qkv.shape
    lse = (n, heads, s) if save and not is_short(qkv) else (0,)
    return qkv.new_empty((n, s, heads * width)), qkv.new_empty(lse, dtype=torch.float32)


def _fwd_cost(qkv: Tensor, positions: Tensor | None, *_: Any) -> _costs.Cost:
    return _costs.attention(qkv, positions, grad=(True,))


@op_range("attention/fwd/triton", _fwd_cost)
def forward(
    qkv: Tensor,
    positions: Tensor | None,
    slopes: Tensor | None,
    alibi_scale: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    scale: float | None,
    dropout_p: float,
    zero_padded: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """[N,S,H*Dh] and, for the backward of what is not short, log2 of the softmax's sums [N,H,S] fp32."""
    out, lse = forward_outputs(qkv, save)
    if qkv.numel() == 0:
        return out, lse
    call = Call(Inputs(qkv, positions, slopes, alibi_scale, lengths, seed), scale, dropout_p, zero_padded)
    programs = call.sequences * call.heads
    if call.short:
        config = short_tiles(call, "attention_fwd_kernel_short")
        launch(attention_fwd_kernel_short, (programs,), out, *call.arguments, **call.constants, **config)
        return out, lse
    config = forward_tiles(call)
    tiles = triton.cdiv(call.tokens, config["BLOCK_M"])
    launch(
        attention_fwd_kernel,
        (programs * tiles,),
        out,
        lse if save else None,
        tiles,
        *call.arguments,
        **call.constants,
        **config,
    )
    return out, lse
