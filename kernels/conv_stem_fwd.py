"""Forward of conv_stem: see conv_stem.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.kernels._common import gelu
from d2vkern.kernels._launch import launch
from d2vkern.kernels._rows import chunk_width, dense, deviations, load_vector, mean_of, tile_columns
from d2vkern.kernels._stem import (
    WAVE,
    WIDE_ROWS,
    add_tile,
    frames_of,
    load_columns,
    packed,
    product_config,
    window_start,
)
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket


@triton.jit(do_not_specialize=["rows", "frames", "length"])
def conv_stem_fwd_kernel(
    x_ptr,  # [B, length, C]
    weight_ptr,  # [K, O] in x's dtype
    norm_weight_ptr,  # [O]
    norm_bias_ptr,  # [O]
    r_ptr,  # [rows, O]: the product; may be y
    y_ptr,  # [rows, O]
    mean_ptr,  # [rows] fp32, or None
    rstd_ptr,  # [rows] fp32, or None
    rows,
    frames,
    length,
    eps,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_M whole rows: all tiles of the product, then the norm of what they wrote."""
    dtype = y_ptr.dtype.element_ty
    first = tl.program_id(0) * BLOCK_M
    # [BLOCK_M]; rows past the end repeat the last one and are not stored
    row = first + tl.arange(0, BLOCK_M)
    live = row < rows
    start = window_start(tl.minimum(row, rows - 1), frames, length, STRIDE, C)
    row64 = row.to(tl.int64)

    for n in range(0, OUT, BLOCK_N):
        # [BLOCK_N]
        column = n + tl.arange(0, BLOCK_N)
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            # [BLOCK_K]
            at = k + tl.arange(0, BLOCK_K)
            if K % BLOCK_K == 0:
                window = tl.load(x_ptr + start[:, None] + at[None, :])
            else:
                window = tl.load(x_ptr + start[:, None] + at[None, :], mask=(at < K)[None, :], other=0.0)
            inside = (at < K)[:, None] & (column < OUT)[None, :]
            weight = tl.load(weight_ptr + at[:, None] * OUT + column[None, :], mask=inside, other=0.0)
            product = tl.dot(window, weight, product, input_precision="ieee")
        here = live[:, None] & (column < OUT)[None, :]
        tl.store(r_ptr + row64[:, None] * OUT + column[None, :], product.to(dtype), mask=here)

    # What other threads of the program have written is read again, out of the caches.
    tl.debug_barrier()
    CHUNKS: tl.constexpr = (OUT + CHUNK - 1) // CHUNK
    for tile in range(0, BLOCK_M, BLOCK_R):
        # [BLOCK_R]
        own = first + tile + tl.arange(0, BLOCK_R)
        own_live = own < rows
        own_row = own.to(tl.int64)[:, None] * OUT
        values = ()
        total = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            # [1, CHUNK] and [BLOCK_R, CHUNK]
            across, within = tile_columns(chunk * CHUNK, own_live, OUT, CHUNK)
            value = tl.load(r_ptr + own_row + across, mask=within, other=0.0).to(tl.float32)
            values = values + (value,)
            total += value
        # [BLOCK_R, 1]
        mean = mean_of(total, OUT)
        centred, variance = deviations(values, mean, OUT, CHUNK)
        rstd = tl.rsqrt(variance[:, None] + tl.full((), eps, tl.float32))
        if mean_ptr is not None:
            tl.store(mean_ptr + own[:, None], mean, mask=own_live[:, None])
            tl.store(rstd_ptr + own[:, None], rstd, mask=own_live[:, None])
        for chunk in tl.static_range(CHUNKS):
            across, within = tile_columns(chunk * CHUNK, own_live, OUT, CHUNK)
            value = centred[chunk] * rstd * load_vector(norm_weight_ptr, across, OUT, BLOCK_R)
            value = gelu(value + load_vector(norm_bias_ptr, across, OUT, BLOCK_R))
            tl.store(y_ptr + own_row + across, value.to(dtype), mask=within)


@triton.jit(do_not_specialize=["rows", "frames", "length"])
def conv_stem_fwd_kernel_wave(
    x_ptr,  # [B, length, C]
    weight_ptr,  # [K, O] in x's dtype
    norm_weight_ptr,  # [O]
    norm_bias_ptr,  # [O]
    y_ptr,  # [rows, O]
    mean_ptr,  # [rows] fp32, or None
    rstd_ptr,  # [rows] fp32, or None
    rows,
    frames,
    length,
    eps,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M whole rows: the product is made once for the moments and once more for the output."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    start = window_start(tl.minimum(row, rows - 1), frames, length, STRIDE, C)
    row64 = row.to(tl.int64)
    at = tl.arange(0, BLOCK_K)
    # [BLOCK_M, BLOCK_K]
    window = tl.load(x_ptr + start[:, None] + at[None, :], mask=(at < K)[None, :], other=0.0)

    count = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, 1], tl.float32)
    squares = tl.zeros([BLOCK_M, 1], tl.float32)
    for n in range(0, OUT, BLOCK_N):
        product = _tile(window, weight_ptr, n, K, OUT, BLOCK_N, BLOCK_K)
        count, mean, squares = add_tile(count, mean, squares, product, n, OUT, BLOCK_N)
    rstd = tl.rsqrt(squares / OUT + tl.full((), eps, tl.float32))
    if mean_ptr is not None:
        tl.store(mean_ptr + row[:, None], mean, mask=live[:, None])
        tl.store(rstd_ptr + row[:, None], rstd, mask=live[:, None])
    for n in range(0, OUT, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        value = (_tile(window, weight_ptr, n, K, OUT, BLOCK_N, BLOCK_K) - mean) * rstd
        value = value * load_columns(norm_weight_ptr, column, OUT) + load_columns(norm_bias_ptr, column, OUT)
        tl.store(
            y_ptr + row64[:, None] * OUT + column[None, :],
            gelu(value).to(y_ptr.dtype.element_ty),
            mask=live[:, None] & (column < OUT)[None, :],
        )


@triton.jit
def _tile(
    window,
    weight_ptr,
    first,
    K: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [M, BLOCK_N]: columns from `first` on of windows [M, BLOCK_K] times the weights; 0 beyond O."""
    at, column = tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_N)
    inside = (at < K)[:, None] & (column < OUT)[None, :]
    weight = tl.load(weight_ptr + at[:, None] * OUT + column[None, :], mask=inside, other=0.0)
    return tl.dot(window, weight, input_precision="ieee")


def recomputes(weight: Tensor, into_x: bool) -> bool:
    """Whether backward makes the product again, and needs no gradient of it as a tensor."""
    return not into_x and weight.shape[1] * weight.shape[2] <= WAVE


def forward_outputs(
    x: Tensor,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    save: bool,
    into_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, frames, o = x.shape[0], frames_of(x, weight, stride), weight.shape[0]
    kept = save and not recomputes(weight, into_x)
    mean, rstd = (x.new_empty((b, frames) if save else (0,), dtype=torch.float32) for _ in range(2))
    return x.new_empty((b, frames, o)), x.new_empty((b, frames, o) if kept else (0,)), mean, rstd


def _fwd_cost(
    x: Tensor, weight: Tensor, stride: int, norm_weight: Tensor, norm_bias: Tensor, eps: float, *rest: bool
) -> _costs.Cost:
    save, into_x = rest
    return _costs.conv_stem(x, weight, stride, norm_weight, norm_bias, eps, grad=(into_x, save))


def _wave_config(x: Tensor, rows: int, width: int) -> Config:
    low = x.element_size() == 2
    tiles = ((64, 64, 4), (64, 128, 4), (128, 64, 8)) if low else ((32, 64, 4), (16, 64, 4))
    candidates = [
        {
            "BLOCK_M": rows_of,
            "BLOCK_N": max(16, min(columns, triton.next_power_of_2(width))),
            "num_warps": warps,
            "num_stages": 1,
        }
        for rows_of, columns, warps in tiles
    ]
    bucket = f"{power_of_two_bucket(rows=rows)} O{width} bytes{x.element_size()}"
    return choose("conv_stem_fwd_kernel_wave", bucket, candidates)


@op_range("conv_stem/fwd/triton", _fwd_cost)
def forward(
    x: Tensor,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    save: bool,
    into_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and for backward the product r, mean and rstd.

    save: whether there will be a backward; mean, rstd and r are empty without. into_x: whether that has to
    make x's gradient; r is empty where it `recomputes`.
    """
    outputs = y, r, mean, rstd = forward_outputs(x, weight, stride, norm_weight, norm_bias, eps, save, into_x)
    if y.numel() == 0:
        return outputs
    (_, length, c), (o, _, taps), frames = x.shape, weight.shape, y.shape[1]
    rows, depth = y.numel() // o, c * taps
    matrix = packed(weight, x, (2, 1, 0))
    shape: dict[str, int] = {"C": c, "STRIDE": stride, "K": depth, "OUT": o}
    if recomputes(weight, into_x):
        wave = _wave_config(x, rows, o)
        launch(
            conv_stem_fwd_kernel_wave,
            (triton.cdiv(rows, wave["BLOCK_M"]),),
            x.contiguous(),
            matrix,
            *dense(norm_weight, norm_bias),
            y,
            *((mean, rstd) if save else (None, None)),
            rows,
            frames,
            length,
            eps,
            BLOCK_K=WAVE,
            **shape,
            **wave,
        )
        return outputs
    config = product_config("conv_stem_fwd_kernel", x, rows, o, depth, wide=rows >= WIDE_ROWS)
    tile = _norm_tile(y, config["num_warps"], config["BLOCK_M"])
    launch(
        conv_stem_fwd_kernel,
        (triton.cdiv(rows, config["BLOCK_M"]),),
        x.contiguous(),
        matrix,
        *dense(norm_weight, norm_bias),
        r if save else y,
        y,
        *((mean, rstd) if save else (None, None)),
        rows,
        frames,
        length,
        eps,
        **shape,
        **tile,
        **config,
    )
    return outputs


def _norm_tile(y: Tensor, warps: int, most_rows: int) -> dict[str, int]:
    """CHUNK and BLOCK_R of the norm's tiles; a warp takes a row's chunk."""
    item, chunk = y.element_size(), chunk_width(y.shape[-1], y.element_size(), most=24)
    return {"CHUNK": chunk, "BLOCK_R": max(1, min(most_rows, warps * (512 // item) // chunk))}
