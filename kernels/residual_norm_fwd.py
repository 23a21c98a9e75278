"""Forward of residual_norm: see residual_norm.py."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.kernels._dropout import dropout_scale, keep_tile, sample_factor, threshold
from d2vkern.kernels._launch import launch
from d2vkern.kernels._rows import (
    as_rows,
    dense,
    deviations,
    load_vector,
    mean_of,
    row_config,
    row_offset,
    tile_columns,
)


@triton.jit(do_not_specialize=["rows", "group", "dropout_threshold", "path_threshold"])
def residual_norm_fwd_kernel(
    x_ptr,  # [samples, group, D]
    update_ptr,  # [samples, group, D]
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    update_bias_ptr,  # [D] or None
    gamma_ptr,  # [D] or None
    seed_ptr,  # [] int64, or None
    y_ptr,  # [rows, D]
    z_ptr,  # [rows, D] or None
    mean_ptr,  # [rows] fp32, or None
    rstd_ptr,  # [rows] fp32, or None
    rows,
    group,
    x_stride_sample,
    x_stride_row,
    update_stride_sample,
    update_stride_row,
    eps,
    scale,
    dropout_threshold,
    path_threshold,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_PATH: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    dtype = y_ptr.dtype.element_ty
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    # [BLOCK_R]
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < rows
    x_row = row_offset(row, group, x_stride_sample, x_stride_row, FLAT)
    update_row = row_offset(row, group, update_stride_sample, update_stride_row, FLAT)
    row64 = row.to(tl.int64)
    # [BLOCK_R, 1]
    factor = sample_factor(row, group, seed, tl.full((), scale, tl.float32), path_threshold, HAS_PATH)

    zs = ()
    total = tl.zeros([BLOCK_R, CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        # [1, CHUNK] and [BLOCK_R, CHUNK]
        column, inside = tile_columns(chunk * CHUNK, live, D, CHUNK)
        z = tl.load(update_ptr + update_row[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        if update_bias_ptr is not None:
            z += load_vector(update_bias_ptr, column, D, BLOCK_R)
        if HAS_DROPOUT:
            keep = keep_tile(row64, chunk * CHUNK, seed, dropout_threshold, D, CHUNK)
            z *= tl.where(keep, factor, 0.0)
        elif HAS_PATH:
            z *= factor
        if gamma_ptr is not None:
            z *= load_vector(gamma_ptr, column, D, BLOCK_R)
        z += tl.load(x_ptr + x_row[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        rounded = z.to(dtype)
        if z_ptr is not None:
            tl.store(z_ptr + row64[:, None] * D + column, rounded, mask=inside)
        zs = zs + (rounded.to(tl.float32),)
        total += zs[chunk]
    # [BLOCK_R, 1]
    mean = mean_of(total, D)
    centred, variance = deviations(zs, mean, D, CHUNK)
    rstd = tl.rsqrt(variance[:, None] + tl.full((), eps, tl.float32))
    if mean_ptr is not None:
        tl.store(mean_ptr + row[:, None], mean, mask=live[:, None])
        tl.store(rstd_ptr + row[:, None], rstd, mask=live[:, None])
    for chunk in tl.static_range(CHUNKS):
        column, inside = tile_columns(chunk * CHUNK, live, D, CHUNK)
        y = centred[chunk] * rstd
        if weight_ptr is not None:
            y *= load_vector(weight_ptr, column, D, BLOCK_R)
        if bias_ptr is not None:
            y += load_vector(bias_ptr, column, D, BLOCK_R)
        tl.store(y_ptr + row64[:, None] * D + column, y.to(dtype), mask=inside)


def forward_outputs(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, prenorm, _eps, _p, _path_p, save = rest
    mean, rstd = (x.new_empty(x.shape[:-1] if save else (0,), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape if save or prenorm else (0,)), mean, rstd


def _fwd_cost(x: Tensor, update: Tensor, *rest: Any) -> _costs.Cost:
    *_, save = rest
    return _costs.residual_norm(x, update, *rest, grad=(save,))


@op_range("residual_norm/fwd/triton", _fwd_cost)
def forward(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    update_bias: Tensor | None,
    gamma: Tensor | None,
    seed: Tensor | None,
    prenorm: bool,
    eps: float,
    dropout_p: float,
    drop_path_p: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, z, mean and rstd; the last two are empty unless `save`, z unless `save` or `prenorm`."""
    y, z, mean, rstd = outputs = forward_outputs(x, prenorm, eps, dropout_p, drop_path_p, save)
    if x.numel() == 0:
        return outputs
    width = x.shape[-1]
    rows = x.numel() // width
    xs, updates = as_rows(x), as_rows(update)
    config = row_config("residual_norm_fwd_kernel", x, most=40)
    launch(
        residual_norm_fwd_kernel,
        (triton.cdiv(rows, config["BLOCK_R"]),),
        xs.tensor,
        updates.tensor,
        *dense(weight, bias, update_bias, gamma),
        seed,
        y,
        z if save or prenorm else None,
        *((mean, rstd) if save else (None, None)),
        rows,
        xs.group,
        xs.stride_sample,
        xs.stride_row,
        updates.stride_sample,
        updates.stride_row,
        eps,
        dropout_scale(dropout_p, drop_path_p),
        threshold(dropout_p),
        threshold(drop_path_p),
        D=width,
        FLAT=xs.flat and updates.flat,
        HAS_DROPOUT=dropout_p > 0,
        HAS_PATH=drop_path_p > 0,
        **config,
    )
    return outputs
