"""Backward of conv_block: see conv_block.py."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.kernels._column_sums import column_sums, new_partials, parts_of
from d2vkern.kernels._common import gelu_grad
from d2vkern.kernels._launch import launch
from d2vkern.kernels._rows import chunk_width, deviations, mean_near, mean_of, replaced, tile_columns
from d2vkern.kernels._taps import Places, Taps, share_of
from d2vkern.kernels._taps_tiles import launch_tiles
from d2vkern.kernels._taps_weight import weight_gradient
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket
from d2vkern.kernels.conv_block_fwd import places_of


@triton.jit(do_not_specialize=["rows"])
def conv_block_bwd_kernel_rows(
    dy_ptr,  # [outputs, D]
    r_ptr,  # [outputs, D]
    slot_ptr,  # [rows] int32: which output a row is, -1: none; or None: rows are the outputs
    dr_ptr,  # [rows, D]
    partials_ptr,  # [programs, D] fp32, maybe empty
    rows,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
):
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    first, last = share_of(rows, program, tl.num_programs(0))
    # one [BLOCK_R, CHUNK] per chunk
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros([BLOCK_R, CHUNK], tl.float32),)

    for start in tl.range(first, last, BLOCK_R, num_stages=STAGES):
        # [BLOCK_R]
        row = start + tl.arange(0, BLOCK_R)
        live = row < last
        output, made = row, live
        if slot_ptr is not None:
            output = tl.load(slot_ptr + row, mask=live, other=-1)
            made = output >= 0
        from_ = output.to(tl.int64)[:, None] * D
        values, gradients = (), ()
        total = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            # [1, CHUNK] and [BLOCK_R, CHUNK]
            column, inside = tile_columns(chunk * CHUNK, made, D, CHUNK)
            values = values + (tl.load(r_ptr + from_ + column, mask=inside, other=0.0).to(tl.float32),)
            dy = tl.load(dy_ptr + from_ + column, mask=inside, other=0.0).to(tl.float32)
            gradients = gradients + (dy,)
            total += values[chunk]
        # [BLOCK_R, CHUNK] and [BLOCK_R]
        values, variance = deviations(values, mean_of(total, D), D, CHUNK)
        # Rows without an output have variance 0, of which there is no root.
        rstd = tl.rsqrt(tl.where(made, variance, 1.0)[:, None] + tl.full((), eps, tl.float32))
        total = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        along = tl.zeros([BLOCK_R, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            normal = values[chunk] * rstd
            dh = gradients[chunk] * gelu_grad(normal)
            values, gradients = replaced(values, chunk, normal), replaced(gradients, chunk, dh)
            total += dh
            along += dh * normal
        mean_total, mean_along = mean_near(total, D), mean_near(along, D)
        for chunk in tl.static_range(CHUNKS):
            column, inside = tile_columns(chunk * CHUNK, live, D, CHUNK)
            dr = (gradients[chunk] - mean_total - values[chunk] * mean_along) * rstd
            tl.store(
                dr_ptr + row.to(tl.int64)[:, None] * D + column,
                dr.to(dr_ptr.dtype.element_ty),
                mask=inside,
            )
            if BIAS:
                sums = replaced(sums, chunk, sums[chunk] + dr)

    if BIAS:
        for chunk in tl.static_range(CHUNKS):
            # [CHUNK]
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            tl.store(
                partials_ptr + program.to(tl.int64) * D + column, tl.sum(sums[chunk], 0), mask=column < D
            )


def backward_outputs(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    residual: bool,
    eps: float,
    masked: Tensor | None,
    clones: int,
    index: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = (
        x.new_empty(0) if like is None or not need else like.new_empty(like.shape)
        for like, need in zip((x, weight, bias), needs, strict=True)
    )
    return dx, dw, db


def _cost(dy: Tensor, x: Tensor, r: Tensor, *rest: Any) -> _costs.Cost:
    *given, needs = rest
    return _costs.conv_block(x, *given, grad=tuple(needs)).of_backward()


@op_range("conv_block/bwd/triton", _cost)
def backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    residual: bool,
    eps: float,
    masked: Tensor | None,
    clones: int,
    index: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those that `needs` does not ask for are empty."""
    dx, dw, db = outputs = backward_outputs(
        dy, x, r, weight, bias, groups, residual, eps, masked, clones, index, needs
    )
    if r.numel() == 0 or x.numel() == 0:
        for out in outputs:
            out.zero_()
        return outputs
    taps, places = Taps.of(weight, groups), places_of(x, masked, index)
    dy, slot = dy.contiguous(), _slots(places)
    dr = _normal_gradient(dy, r, slot, places, eps, db if bias is not None and needs[2] else None)
    if needs[0]:
        everywhere = places_of(x, None, None)
        launch_tiles(
            dr,
            weight,
            taps.gradient(),
            everywhere,
            dx,
            summed=masked,
            clones=clones,
            add=dy if residual else None,
            slot=slot if residual else None,
        )
    if needs[1]:
        weight_gradient(x, dr, taps, places, masked, clones, dw)
    return outputs


def _slots(places: Places) -> Tensor | None:
    """[samples * width] int32: which output each row is, -1: none. None where all are, in order."""
    if places.index is None:
        return None
    index = places.index.long()
    slot = index.new_full((places.samples, places.width), -1, dtype=torch.int32)
    numbers = torch.arange(places.outputs, dtype=torch.int32, device=index.device)
    return slot.scatter_(1, index, numbers.view(index.shape))


def _rows_config(dr: Tensor) -> Config:
    """Up to 16 values of a row a thread: 24, with no idle lanes at width 768, spill on sm_100 with slots, and
    so does width 1,024 in fp32 with 4 warps.
    """
    (rows, width), itemsize = dr.shape, dr.element_size()
    span, ahead = 512 // itemsize, 3 if itemsize < 4 else 2
    first, second = (4, 8) if itemsize < 4 else (8, 4)
    candidates = []
    for most, least, stages in ((16, first, ahead), (16, second, ahead), (24, 8, ahead), (24, 4, ahead)):
        chunk = chunk_width(width, itemsize, most)
        warps = max(least, chunk // span)
        tile = {"CHUNK": chunk, "BLOCK_R": warps * span // chunk, "STAGES": stages, "num_warps": warps}
        if tile not in candidates:  # narrow rows know fewer chunks
            candidates.append(tile)
    bucket = f"{power_of_two_bucket(rows=rows)} D{width} bytes{itemsize}"
    return choose("conv_block_bwd_kernel_rows", bucket, candidates)


def _normal_gradient(
    dy: Tensor, r: Tensor, slot: Tensor | None, places: Places, eps: float, db: Tensor | None
) -> Tensor:
    """Gradient of the convolution's output at every place, [rows, O]; db is written where given."""
    width = r.shape[-1]
    rows = places.samples * places.height * places.width
    dr = r.new_empty((rows, width))
    programs = parts_of(rows, least=40)
    partials = new_partials(r, programs, (db,))
    launch(
        conv_block_bwd_kernel_rows,
        (programs,),
        dy,
        r,
        slot,
        dr,
        partials,
        rows,
        eps,
        D=width,
        BIAS=db is not None,
        **_rows_config(dr),
    )
    if db is not None:
        column_sums(partials, (db,))
    return dr
