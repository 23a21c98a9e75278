"""Backward of conv_stem where the product was kept: see conv_stem.py."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._library import gradients_like, needed
from d2vkern._nvtx import op_range
from d2vkern.kernels._column_sums import column_sums, new_partials, parts_of
from d2vkern.kernels._common import gelu_grad
from d2vkern.kernels._launch import MULTIPROCESSORS, busy, launch
from d2vkern.kernels._rows import (
    as_rows,
    dense,
    load_vector,
    mean_near,
    replaced,
    row_config,
    row_offset,
    tile_columns,
)
from d2vkern.kernels._stem import WIDE_ROWS, packed, product_config, window_start
from d2vkern.kernels._stem_wave import wave_backward

_PROGRAMS = 2 * MULTIPROCESSORS


@triton.jit(do_not_specialize=["rows", "group"])
def conv_stem_bwd_kernel_norm(
    dy_ptr,  # [samples, group, O]
    r_ptr,  # [rows, O]
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    weight_ptr,  # [O]
    bias_ptr,  # [O]
    dr_ptr,  # [rows, O] or None
    partials_ptr,  # [programs, (WEIGHT + BIAS) * O] fp32, maybe empty
    rows,
    group,
    dy_stride_sample,
    dy_stride_row,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """GELU and LayerNorm: a share of the rows, with the column sums of theirs."""
    CHUNKS: tl.constexpr = (OUT + CHUNK - 1) // CHUNK
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first = (rows * program // programs).to(tl.int32)
    last = (rows * (program + 1) // programs).to(tl.int32)

    # one [BLOCK_R, CHUNK] per chunk
    dweights, dbiases = (), ()
    for _ in tl.static_range(CHUNKS):
        zero = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        dweights, dbiases = dweights + (zero,), dbiases + (zero,)

    for start in tl.range(first, last, BLOCK_R, num_stages=STAGES):
        # [BLOCK_R]
        row = start + tl.arange(0, BLOCK_R)
        live = row < last
        dy_row = row_offset(row, group, dy_stride_sample, dy_stride_row, FLAT)
        row64 = row.to(tl.int64)
        # [BLOCK_R, 1]
        mean = tl.load(mean_ptr + row[:, None], mask=live[:, None], other=0.0)
        rstd = tl.load(rstd_ptr + row[:, None], mask=live[:, None], other=0.0)

        gradients, normals = (), ()
        total = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        along = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            # [1, CHUNK] and [BLOCK_R, CHUNK]
            column, inside = tile_columns(chunk * CHUNK, live, OUT, CHUNK)
            dy = tl.load(dy_ptr + dy_row[:, None] + column, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(r_ptr + row64[:, None] * OUT + column, mask=inside, other=0.0).to(tl.float32)
            normal = (r - mean) * rstd
            weight = load_vector(weight_ptr, column, OUT, BLOCK_R)
            dh = dy * gelu_grad(normal * weight + load_vector(bias_ptr, column, OUT, BLOCK_R))
            if WEIGHT:
                dweights = replaced(dweights, chunk, dweights[chunk] + dh * normal)
            if BIAS:
                dbiases = replaced(dbiases, chunk, dbiases[chunk] + dh)
            dh *= weight
            total += dh
            along += dh * normal
            gradients, normals = gradients + (dh,), normals + (normal,)
        if dr_ptr is not None:
            # [BLOCK_R, 1]
            mean_total, mean_along = mean_near(total, OUT), mean_near(along, OUT)
            for chunk in tl.static_range(CHUNKS):
                column, inside = tile_columns(chunk * CHUNK, live, OUT, CHUNK)
                dr = (gradients[chunk] - mean_total - normals[chunk] * mean_along) * rstd
                tl.store(dr_ptr + row64[:, None] * OUT + column, dr.to(dr_ptr.dtype.element_ty), mask=inside)

    sums_ptr = partials_ptr + program * (OUT * (WEIGHT + BIAS))
    for chunk in tl.static_range(CHUNKS):
        # [CHUNK]
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        if WEIGHT:
            tl.store(sums_ptr + column, tl.sum(dweights[chunk], 0), mask=column < OUT)
        if BIAS:
            tl.store(sums_ptr + OUT * WEIGHT + column, tl.sum(dbiases[chunk], 0), mask=column < OUT)


@triton.jit(do_not_specialize=["samples", "frames", "length"])
def conv_stem_bwd_kernel_input(
    dr_ptr,  # [samples, frames, O]
    weight_ptr,  # [TAPS, O, C] in x's dtype
    dx_ptr,  # [samples, length, C]
    samples,
    frames,
    length,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M places q * STRIDE + phase of one phase: they meet taps phase + j * STRIDE of frames q - j."""
    TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    phase = tl.program_id(1)
    places = (length - phase + STRIDE - 1) // STRIDE
    # [BLOCK_M]
    row = tl.program_id(0) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < samples * places
    sample, q = row // places, row % places
    dr_row = (sample.to(tl.int64) * frames + q) * OUT
    # [BLOCK_N]
    channel = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = (TAPS - phase + STRIDE - 1) // STRIDE * OUT
    dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        # K runs over (j, output channel); [BLOCK_K], j a scalar where a block lies within one tap
        at = k + tl.arange(0, BLOCK_K)
        if OUT % BLOCK_K == 0:
            j = k // OUT
            frame = q - j
            inside = (live & (frame >= 0) & (frame < frames))[:, None]
            weight_row = ((phase + j * STRIDE) * OUT + k % OUT + tl.arange(0, BLOCK_K)) * C
            weight_inside = (channel < C)[None, :]
            offset = k % OUT + tl.arange(0, BLOCK_K) - j * OUT
        else:
            j = at // OUT
            frame = q[:, None] - j[None, :]
            inside = live[:, None] & (frame >= 0) & (frame < frames) & (at < depth)[None, :]
            weight_row = ((phase + j * STRIDE) * OUT + at % OUT) * C
            weight_inside = (at < depth)[:, None] & (channel < C)[None, :]
            offset = at % OUT - j * OUT
        dr = tl.load(dr_ptr + dr_row[:, None] + offset[None, :], mask=inside, other=0.0)
        weight = tl.load(weight_ptr + weight_row[:, None] + channel[None, :], mask=weight_inside, other=0.0)
        dx = tl.dot(dr, weight, dx, input_precision="ieee")
    place = (sample.to(tl.int64) * length + q * STRIDE + phase) * C
    tl.store(
        dx_ptr + place[:, None] + channel[None, :],
        dx.to(dx_ptr.dtype.element_ty),
        mask=live[:, None] & (channel < C)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "frames", "length"])
def conv_stem_bwd_kernel_weight(
    x_ptr,  # [B, length, C]
    dr_ptr,  # [rows, O]
    partials_ptr,  # [shares, K, O] fp32
    rows,
    frames,
    length,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of windows' * dr over a share of the rows."""
    TILES: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    share, shares = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = (rows * share // shares).to(tl.int32)
    last = (rows * (share + 1) // shares).to(tl.int32)
    # [BLOCK_M] and [BLOCK_N]
    at = tl.program_id(0) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for base in range(first, last, BLOCK_K):
        # [BLOCK_K]
        row = base + tl.arange(0, BLOCK_K)
        live = (row < last)[:, None]
        start = window_start(row, frames, length, STRIDE, C)
        window = tl.load(x_ptr + start[:, None] + at[None, :], mask=live & (at < K)[None, :], other=0.0)
        dr = tl.load(
            dr_ptr + row.to(tl.int64)[:, None] * OUT + column[None, :],
            mask=live & (column < OUT)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(window), dr, total, input_precision="ieee")
    tl.store(
        partials_ptr + share * (K * OUT) + at[:, None] * OUT + column[None, :],
        total,
        mask=(at < K)[:, None] & (column < OUT)[None, :],
    )


@triton.jit(do_not_specialize=["shares"])
def conv_stem_bwd_kernel_sum(
    partials_ptr,  # [shares, TAPS, C, O] fp32
    dweight_ptr,  # [O, C, TAPS]
    shares,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK values of the weight's gradient: the shares' in their order."""
    SIZE: tl.constexpr = TAPS * C * OUT
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    source = partials_ptr + at
    for _ in range(0, shares):
        total += tl.load(source, mask=at < SIZE, other=0.0)
        source += SIZE
    place = (at % OUT * C + at // OUT % C) * TAPS + at // (OUT * C)
    tl.store(dweight_ptr + place, total.to(dweight_ptr.dtype.element_ty), mask=at < SIZE)


def backward_outputs(*call: Any) -> tuple[Tensor, ...]:
    _dy, x, *_saved, weight, _stride, norm_weight, norm_bias, needs = call
    return gradients_like((x, weight, norm_weight, norm_bias), needs)


def _bwd_cost(*call: Any) -> _costs.Cost:
    _dy, x, *_saved, weight, stride, norm_weight, norm_bias, needs = call
    return _costs.conv_stem(x, weight, stride, norm_weight, norm_bias, 0.0, grad=tuple(needs)).of_backward()


@op_range("conv_stem/bwd/triton", _bwd_cost)
def backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, norm_weight and norm_bias; those that `needs` does not ask for are empty."""
    outputs = gradients_like((x, weight, norm_weight, norm_bias), needs)
    if dy.numel() == 0:
        return tuple(out.zero_() for out in outputs)
    dx, dw, dnw, dnb = needed(outputs, needs)
    x = x.contiguous()
    if r.numel() == 0:
        wave_backward(dy, x, mean, rstd, weight, stride, norm_weight, norm_bias, dw, dnw, dnb)
        return outputs
    dr = r.new_empty(r.shape) if dx is not None or dw is not None else None
    _through_norm(dy, r, mean, rstd, norm_weight, norm_bias, dr, dnw, dnb)
    if dx is not None and dr is not None:
        _into_input(dr, weight, stride, dx)
    if dw is not None and dr is not None:
        _into_weight(x, dr, stride, dw)
    return outputs


def _through_norm(
    dy: Tensor,
    r: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    dr: Tensor | None,
    dnw: Tensor | None,
    dnb: Tensor | None,
) -> None:
    """Write dr, dnw and dnb where given."""
    width = r.shape[-1]
    rows = r.numel() // width
    programs = parts_of(rows, least=40)
    partials = new_partials(r, programs, (dnw, dnb))
    dys = as_rows(dy)
    # Two sums over columns take as many registers as the gradients and normal values of a row.
    config = row_config("conv_stem_bwd_kernel_norm", r, most=16, loop=True)
    launch(
        conv_stem_bwd_kernel_norm,
        (programs,),
        dys.tensor,
        r,
        mean,
        rstd,
        *dense(norm_weight, norm_bias),
        dr,
        partials,
        rows,
        dys.group,
        dys.stride_sample,
        dys.stride_row,
        OUT=width,
        FLAT=dys.flat,
        WEIGHT=dnw is not None,
        BIAS=dnb is not None,
        **config,
    )
    if dnw is not None or dnb is not None:
        column_sums(partials, [out for out in (dnw, dnb) if out is not None])


def _into_input(dr: Tensor, weight: Tensor, stride: int, dx: Tensor) -> None:
    samples, length, c = dx.shape
    o, _, taps = weight.shape
    rows = samples * triton.cdiv(length, stride)
    config = product_config(
        "conv_stem_bwd_kernel_input", dx, rows, c, triton.cdiv(taps, stride) * o, wide=rows >= WIDE_ROWS
    )
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(c, config["BLOCK_N"])
    launch(
        conv_stem_bwd_kernel_input,
        (tiles, min(stride, length)),
        dr,
        packed(weight, dx, (2, 0, 1)),
        dx,
        samples,
        dr.shape[1],
        length,
        C=c,
        STRIDE=stride,
        TAPS=taps,
        OUT=o,
        **config,
    )


def _shares(tiles: int, rows: int, values: int, moved: int) -> int:
    """How many programs share the rows of a tile: those that leave the fewest multiprocessors without work.

    Partials, 8 bytes per value and share, stay within an eighth of the bytes backward moves anyway, unless
    that would not give one program to each multiprocessor.
    """
    light = max(moved // 8 // (8 * values), MULTIPROCESSORS // tiles)
    most = max(1, min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(rows, 128), light))
    return max(range(1, most + 1), key=lambda shares: (busy(tiles * shares), -shares))


def _into_weight(x: Tensor, dr: Tensor, stride: int, dw: Tensor) -> None:
    (_, length, c), (o, _, taps) = x.shape, dw.shape
    rows, depth = dr.numel() // o, c * taps
    config = product_config("conv_stem_bwd_kernel_weight", x, depth, o, rows, wide=rows >= WIDE_ROWS)
    tiles = triton.cdiv(depth, config["BLOCK_M"]) * triton.cdiv(o, config["BLOCK_N"])
    shares = _shares(tiles, rows, depth * o, (5 * o + 2 * stride * c) * rows * x.element_size())
    partials = x.new_empty((shares, depth, o), dtype=torch.float32)
    shape: dict[str, Any] = {"C": c, "OUT": o}
    launch(
        conv_stem_bwd_kernel_weight,
        (tiles, shares),
        x,
        dr,
        partials,
        rows,
        dr.shape[1],
        length,
        STRIDE=stride,
        K=depth,
        **shape,
        **config,
    )
    block = 1024
    launch(
        conv_stem_bwd_kernel_sum,
        (triton.cdiv(depth * o, block),),
        partials,
        dw,
        shares,
        TAPS=taps,
        BLOCK=block,
        **shape,
    )
