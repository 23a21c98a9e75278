"""Backward of residual_norm: see residual_norm.py."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._library import gradients_like, needed
from d2vkern._nvtx import op_range
from d2vkern.kernels._column_sums import column_sums, new_partials, parts_of
from d2vkern.kernels._dropout import dropout_scale, keep_tile, sample_factor, threshold
from d2vkern.kernels._launch import launch
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


# What changes from batch to batch compiles nothing anew.
@triton.jit(do_not_specialize=["rows", "group", "dropout_threshold", "path_threshold"])
def residual_norm_bwd_kernel_rows(
    dy_ptr,  # [samples, group, D]
    dsum_ptr,  # [rows, D] or None
    z_ptr,  # [rows, D]
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    weight_ptr,  # [D] or None
    update_ptr,  # [rows, D], or None: no gradient of gamma
    update_bias_ptr,  # [D] or None
    gamma_ptr,  # [D] or None
    seed_ptr,  # [] int64, or None
    dx_ptr,  # [rows, D] or None
    dupdate_ptr,  # [rows, D] or None
    partials_ptr,  # [programs, (WEIGHT + BIAS + UPDATE_BIAS + GAMMA) * D] fp32, maybe empty
    rows,
    group,
    dy_stride_sample,
    dy_stride_row,
    scale,
    dropout_threshold,
    path_threshold,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_PATH: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    UPDATE_BIAS: tl.constexpr,
    GAMMA: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    seed = 0 if seed_ptr is None else tl.load(seed_ptr)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first = (rows * program // programs).to(tl.int32)
    last = (rows * (program + 1) // programs).to(tl.int32)

    # one [BLOCK_R, CHUNK] per chunk
    weights, dweights, dbiases, dupdate_biases, dgammas = (), (), (), (), ()
    for chunk in tl.static_range(CHUNKS):
        if weight_ptr is not None:
            column = (chunk * CHUNK + tl.arange(0, CHUNK))[None, :]
            weights = weights + (load_vector(weight_ptr, column, D, BLOCK_R),)
        zero = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        dweights, dbiases = dweights + (zero,), dbiases + (zero,)
        dupdate_biases, dgammas = dupdate_biases + (zero,), dgammas + (zero,)

    for start in tl.range(first, last, BLOCK_R, num_stages=STAGES):
        # [BLOCK_R]
        row = start + tl.arange(0, BLOCK_R)
        live = row < last
        dy_row = row_offset(row, group, dy_stride_sample, dy_stride_row, FLAT)
        row64 = row.to(tl.int64)
        # [BLOCK_R, 1]
        mean = tl.load(mean_ptr + row[:, None], mask=live[:, None], other=0.0)
        rstd = tl.load(rstd_ptr + row[:, None], mask=live[:, None], other=0.0)
        factor = sample_factor(row, group, seed, tl.full((), scale, tl.float32), path_threshold, HAS_PATH)

        gradients, normals = (), ()
        total = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        along = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            # [1, CHUNK] and [BLOCK_R, CHUNK]
            column, inside = tile_columns(chunk * CHUNK, live, D, CHUNK)
            dy = tl.load(dy_ptr + dy_row[:, None] + column, mask=inside, other=0.0).to(tl.float32)
            z = tl.load(z_ptr + row64[:, None] * D + column, mask=inside, other=0.0).to(tl.float32)
            normal = (z - mean) * rstd
            if WEIGHT:
                dweights = replaced(dweights, chunk, dweights[chunk] + dy * normal)
            if BIAS:
                dbiases = replaced(dbiases, chunk, dbiases[chunk] + dy)
            if weight_ptr is not None:
                dy *= weights[chunk]
            total += dy
            along += dy * normal
            gradients, normals = gradients + (dy,), normals + (normal,)
        # [BLOCK_R, 1]
        mean_total, mean_along = mean_near(total, D), mean_near(along, D)
        for chunk in tl.static_range(CHUNKS):
            column, inside = tile_columns(chunk * CHUNK, live, D, CHUNK)
            at = row64[:, None] * D + column
            dz = (gradients[chunk] - mean_total - normals[chunk] * mean_along) * rstd
            if dsum_ptr is not None:
                dz += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if dx_ptr is not None:
                tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=inside)
            if HAS_DROPOUT:
                keep = keep_tile(row64, chunk * CHUNK, seed, dropout_threshold, D, CHUNK)
                dz *= tl.where(keep, factor, 0.0)
            elif HAS_PATH:
                dz *= factor
            if GAMMA:
                update = tl.load(update_ptr + at, mask=inside, other=0.0).to(tl.float32)
                if update_bias_ptr is not None:
                    update += load_vector(update_bias_ptr, column, D, BLOCK_R)
                dgammas = replaced(dgammas, chunk, dgammas[chunk] + dz * update)
            if gamma_ptr is not None:
                dz *= load_vector(gamma_ptr, column, D, BLOCK_R)
            if dupdate_ptr is not None:
                tl.store(dupdate_ptr + at, dz.to(dupdate_ptr.dtype.element_ty), mask=inside)
            if UPDATE_BIAS:
                dupdate_biases = replaced(dupdate_biases, chunk, dupdate_biases[chunk] + dz)

    sums_ptr = partials_ptr + program * (D * (WEIGHT + BIAS + UPDATE_BIAS + GAMMA))
    for chunk in tl.static_range(CHUNKS):
        # [CHUNK]
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        if WEIGHT:
            tl.store(sums_ptr + column, tl.sum(dweights[chunk], 0), mask=column < D)
        if BIAS:
            tl.store(sums_ptr + D * WEIGHT + column, tl.sum(dbiases[chunk], 0), mask=column < D)
        if UPDATE_BIAS:
            at = D * (WEIGHT + BIAS) + column
            tl.store(sums_ptr + at, tl.sum(dupdate_biases[chunk], 0), mask=column < D)
        if GAMMA:
            at = D * (WEIGHT + BIAS + UPDATE_BIAS) + column
            tl.store(sums_ptr + at, tl.sum(dgammas[chunk], 0), mask=column < D)


def backward_outputs(
    dy: Tensor,
    dsum: Tensor | None,
    update: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *vectors, _seed, update_dtype, _p, _path_p, needs = rest
    like_update = z.new_empty(z.shape if needs[1] else (0,), dtype=update_dtype)
    dx, _, *dvectors = gradients_like((z, None, *vectors), needs)
    return dx, like_update, *dvectors


def _bwd_cost(
    dy: Tensor,
    dsum: Tensor | None,
    update: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *rest: Any,
) -> _costs.Cost:
    *vectors, seed, update_dtype, _p, _path_p, _needs = rest
    like_update = z.new_empty(0, dtype=update_dtype)
    return _costs.residual_norm(z, like_update, *vectors, seed, dsum is not None, grad=(True,)).of_backward()


@op_range("residual_norm/bwd/triton", _bwd_cost)
def backward(
    dy: Tensor,
    dsum: Tensor | None,
    update: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    update_bias: Tensor | None,
    gamma: Tensor | None,
    seed: Tensor | None,
    update_dtype: torch.dtype,
    dropout_p: float,
    drop_path_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, update, weight, bias, update_bias and gamma; empty where `needs` does not ask for one.

    update: given with gamma.
    """
    vectors = (weight, bias, update_bias, gamma)
    outputs = backward_outputs(
        dy, dsum, update, z, mean, rstd, *vectors, seed, update_dtype, dropout_p, drop_path_p, needs
    )
    dx, dupdate, *dvectors = needed(outputs, needs)
    width = z.shape[-1]
    rows = z.numel() // width if z.numel() else 0
    programs = parts_of(rows, least=40)
    partials = new_partials(z, programs, dvectors)
    if rows:
        dys = as_rows(dy)
        # Each sum over columns takes as many registers as the values of a row that a thread holds.
        most = 16 if needs[4] or needs[5] else 24
        config = row_config("residual_norm_bwd_kernel_rows", z, most, loop=True)
        launch(
            residual_norm_bwd_kernel_rows,
            (programs,),
            dys.tensor,
            *dense(dsum),
            z,
            mean,
            rstd,
            *dense(weight, update if needs[5] else None, update_bias if needs[5] else None, gamma),
            seed,
            dx,
            dupdate,
            partials,
            rows,
            dys.group,
            dys.stride_sample,
            dys.stride_row,
            dropout_scale(dropout_p, drop_path_p),
            threshold(dropout_p),
            threshold(drop_path_p),
            D=width,
            FLAT=dys.flat,
            HAS_DROPOUT=dropout_p > 0,
            HAS_PATH=drop_path_p > 0,
            WEIGHT=needs[2],
            BIAS=needs[3],
            UPDATE_BIAS=needs[4],
            GAMMA=needs[5],
            **config,
        )
    if any(needs[2:]):
        column_sums(partials, dvectors)
    return outputs
