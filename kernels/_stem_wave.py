"""Backward of conv_stem over the waveform, where the product is made again and has no gradient of its own.

With windows x_k of K <= 16 values, weights W [K, O], product r = x W, normal n = (r - mean) rstd and
dh = dy gelu'(h), the gradient of the weights is linear in three sums over the rows:

    U[k, o] = sum x_k rstd dh[o]
    S[k, j] = sum x_k rstd c2 x_j rstd,   c2 = mean over o of dh[o] w[o] n[o]
    Q = w U - S W;   dW = Q - mean of Q over o

since dr = rstd (dh w - mean(dh w) - n c2): the two means over o come out of the sums as one, and r is W's
combination of the windows. Only c2 needs whole rows. So a program takes one tile of columns and a share of
the rows, reads dy and the waveform once, and writes its part of U and its columns' part of each row's c2:
4 / BLOCK_N of a number of values [rows, O]. A second kernel makes S of the waveform and c2, in exact fp32,
since neighbouring taps nearly cancel in S W where the filters have no mean. The sums of dh n and dh stay in
fp32, by element, until a program's last row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._column_sums import column_sums, new_partials
from d2vkern.kernels._common import gelu_grad
from d2vkern.kernels._launch import launch
from d2vkern.kernels._rows import as_rows, dense, row_offset
from d2vkern.kernels._stem import WAVE, load_columns, packed, window_start
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket

_PROGRAMS = 384
_MOST_PARTS = 16
"""of a share, in which S is made: more programs, since one has little to do in a tile of rows"""


@triton.jit(do_not_specialize=["rows", "frames", "length", "group", "columns"])
def conv_stem_bwd_kernel_wave(
    dy_ptr,  # [samples, group, O]
    x_ptr,  # [B, length, C]
    weight_ptr,  # [K, O] in x's dtype
    norm_weight_ptr,  # [O]
    norm_bias_ptr,  # [O]
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    along_ptr,  # [tiles, rows] fp32: sums of dh w n over a tile's columns, or None
    partials_ptr,  # [shares, columns] fp32: U, S, then sums of dh n and dh
    rows,
    frames,
    length,
    group,
    columns,
    dy_stride_sample,
    dy_stride_row,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    OUT: tl.constexpr,
    FLAT: tl.constexpr,
    SQUARES: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    share, shares = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = (rows * share // shares).to(tl.int32)
    last = (rows * (share + 1) // shares).to(tl.int32)
    dtype = x_ptr.dtype.element_ty
    # [BLOCK_K] and [BLOCK_N]
    at, column = tl.arange(0, BLOCK_K), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (at < K)[:, None] & (column < OUT)[None, :]
    weight = tl.load(weight_ptr + at[:, None] * OUT + column[None, :], mask=inside, other=0.0)
    # [1, BLOCK_N]
    norm_weight, norm_bias = (
        load_columns(norm_weight_ptr, column, OUT),
        load_columns(norm_bias_ptr, column, OUT),
    )

    products = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for base in range(first, last, BLOCK_M):
        # [BLOCK_M]
        row = base + tl.arange(0, BLOCK_M)
        live = row < last
        start = window_start(row, frames, length, STRIDE, C)
        # [BLOCK_M, BLOCK_K]
        window = tl.load(
            x_ptr + start[:, None] + at[None, :], mask=live[:, None] & (at < K)[None, :], other=0.0
        )
        # [BLOCK_M, 1]
        mean = tl.load(mean_ptr + row[:, None], mask=live[:, None], other=0.0)
        rstd = tl.load(rstd_ptr + row[:, None], mask=live[:, None], other=0.0)
        # [BLOCK_M, BLOCK_N]
        dy_row = row_offset(row, group, dy_stride_sample, dy_stride_row, FLAT)
        dh = tl.load(
            dy_ptr + dy_row[:, None] + column[None, :],
            mask=live[:, None] & (column < OUT)[None, :],
            other=0.0,
        ).to(tl.float32)
        normal = (tl.dot(window, weight, input_precision="ieee") - mean) * rstd
        dh *= gelu_grad(normal * norm_weight + norm_bias)
        along = dh * normal
        if WEIGHT:
            dweight += along
        if BIAS:
            dbias += dh
        if along_ptr is not None:
            products = tl.dot(tl.trans(window), (dh * rstd).to(dtype), products, input_precision="ieee")
            along_sum = tl.sum(along * norm_weight, 1)[:, None]
            tl.store(along_ptr + tile.to(tl.int64) * rows + row[:, None], along_sum, mask=live[:, None])

    sums_ptr = partials_ptr + share * columns
    if along_ptr is not None:
        tl.store(sums_ptr + at[:, None] * OUT + column[None, :], products, mask=inside)
        sums_ptr += K * OUT + SQUARES * K * K
    if WEIGHT:
        tl.store(sums_ptr + column, tl.sum(dweight, 0), mask=column < OUT)
    if BIAS:
        tl.store(sums_ptr + WEIGHT * OUT + column, tl.sum(dbias, 0), mask=column < OUT)


@triton.jit(do_not_specialize=["rows", "frames", "length", "tiles", "columns"])
def conv_stem_bwd_kernel_wave_squares(
    x_ptr,  # [B, length, C]
    rstd_ptr,  # [rows] fp32
    along_ptr,  # [tiles, rows] fp32
    partials_ptr,  # [shares, columns] fp32, from the first S on
    rows,
    frames,
    length,
    tiles,
    columns,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """S over a part of a share."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    share, shares = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = (rows * (share * parts + part) // (shares * parts)).to(tl.int32)
    last = (rows * (share * parts + part + 1) // (shares * parts)).to(tl.int32)
    at, other = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K)
    squares = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    for base in range(first, last, BLOCK_M):
        # [BLOCK_M]
        row = base + tl.arange(0, BLOCK_M)
        live = row < last
        start = window_start(row, frames, length, STRIDE, C)
        # [BLOCK_M, BLOCK_K]
        window = tl.load(
            x_ptr + start[:, None] + at[None, :], mask=live[:, None] & (at < K)[None, :], other=0.0
        )
        # [BLOCK_M]
        rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
        c2 = tl.zeros([BLOCK_M], tl.float32)
        source = along_ptr + row
        for _ in range(0, tiles):
            c2 += tl.load(source, mask=live, other=0.0)
            source += rows
        plain = window.to(tl.float32) * rstd[:, None]
        squares = tl.dot(tl.trans(plain * (c2 / OUT)[:, None]), plain, squares, input_precision="ieee")
    tl.store(
        partials_ptr + share * columns + part * (K * K) + at[:, None] * K + other[None, :],
        squares,
        mask=(at < K)[:, None] & (other < K)[None, :],
    )


@triton.jit
def conv_stem_bwd_kernel_wave_finish(
    sums_ptr,  # [K * O + SQUARES * K * K] fp32: U and the parts of S
    weight_ptr,  # [K, O]
    norm_weight_ptr,  # [O]
    dweight_ptr,  # [O, C, TAPS]
    SQUARES: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Row k of dW from U and S."""
    K: tl.constexpr = TAPS * C
    k = tl.program_id(0)
    # [BLOCK_N]
    column = tl.arange(0, BLOCK_N)
    inside = column < OUT
    q = tl.load(sums_ptr + k * OUT + column, mask=inside, other=0.0)
    q *= tl.load(norm_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for j in range(0, K):
        part = tl.arange(0, SQUARES)
        square = tl.sum(tl.load(sums_ptr + K * OUT + (part * K + k) * K + j), 0)
        q -= square * tl.load(weight_ptr + j * OUT + column, mask=inside, other=0.0).to(tl.float32)
    q -= tl.sum(q, 0) / OUT
    place = (column * C + k % C) * TAPS + k // C
    tl.store(dweight_ptr + place, q.to(dweight_ptr.dtype.element_ty), mask=inside)


def _config(x: Tensor, rows: int, width: int) -> Config:
    low = x.element_size() == 2
    tiles = ((64, 32, 4), (64, 64, 8), (64, 16, 4)) if low else ((16, 64, 4), (16, 32, 4))
    candidates = [
        {
            "BLOCK_M": most,
            "BLOCK_N": max(16, min(columns, triton.next_power_of_2(width))),
            "num_warps": warps,
            "num_stages": 2,
        }
        for most, columns, warps in tiles
    ]
    bucket = f"{power_of_two_bucket(rows=rows)} O{width} bytes{x.element_size()}"
    return choose("conv_stem_bwd_kernel_wave", bucket, candidates)


def wave_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    dw: Tensor | None,
    dnw: Tensor | None,
    dnb: Tensor | None,
) -> None:
    """Write the gradients of weight, norm_weight and norm_bias where given."""
    (_, length, c), (o, _, taps) = x.shape, weight.shape
    rows, depth = mean.numel(), c * taps
    matrix = packed(weight, x, (2, 1, 0))
    config = _config(x, rows, o)
    tiles = triton.cdiv(o, config["BLOCK_N"])
    shares = max(1, min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(rows, 64)))
    parts = min(_MOST_PARTS, triton.next_power_of_2(triton.cdiv(rows, 16 * shares)))
    sums = along = None
    if dw is not None:
        sums = x.new_empty((depth * o + parts * depth * depth,), dtype=torch.float32)
        along = x.new_empty((tiles, rows), dtype=torch.float32)
    partials = new_partials(x, shares, (sums, dnw, dnb))
    norm_weight, norm_bias = (v for v in dense(norm_weight, norm_bias) if v is not None)
    shape = {"C": c, "STRIDE": stride, "K": depth, "OUT": o, "BLOCK_K": WAVE}
    dys = as_rows(dy)
    launch(
        conv_stem_bwd_kernel_wave,
        (tiles, shares),
        dys.tensor,
        x,
        matrix,
        norm_weight,
        norm_bias,
        mean,
        rstd,
        along,
        partials,
        rows,
        dy.shape[1],
        length,
        dys.group,
        partials.shape[1],
        dys.stride_sample,
        dys.stride_row,
        **shape,
        FLAT=dys.flat,
        SQUARES=parts,
        WEIGHT=dnw is not None,
        BIAS=dnb is not None,
        **config,
    )
    if along is not None:
        launch(
            conv_stem_bwd_kernel_wave_squares,
            (parts, shares),
            x,
            rstd,
            along,
            partials[:, depth * o :],
            rows,
            dy.shape[1],
            length,
            tiles,
            partials.shape[1],
            BLOCK_M=32,
            num_warps=1,
            **shape,
        )
    column_sums(partials, [out for out in (sums, dnw, dnb) if out is not None])
    if dw is not None:
        launch(
            conv_stem_bwd_kernel_wave_finish,
            (depth,),
            sums,
            matrix,
            norm_weight,
            dw,
            SQUARES=parts,
            C=c,
            TAPS=taps,
            OUT=o,
            BLOCK_N=triton.next_power_of_2(o),
        )
