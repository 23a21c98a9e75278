"""gather_bwd_kernel_rows: all gradients of a gather from one pass over dout; see gather.py."""

import math

import triton
import triton.language as tl
from torch import Tensor

from d2vkern._library import needed
from d2vkern.functions.gather import GATHER_BWD, Gradients
from d2vkern.kernels._column_sums import MOST_PARTS, column_sums, new_partials
from d2vkern.kernels._launch import launch
from d2vkern.kernels._tuning import choose, power_of_two_bucket
from d2vkern.kernels.gather_fwd import chunk_of, columns, dense_columns, grid, program, tiles

SAMPLES_PER_SUM = 4
"""samples that a partial sum of dpositions covers, at least"""


# Counts that change from batch to batch compile nothing anew.
@triton.jit(do_not_specialize=["groups", "samples", "tokens", "extras", "first", "summed"])
def gather_bwd_kernel_rows(
    dout_ptr,  # [N, E + K, D]
    slot_ptr,  # [N, T] int32
    dx_ptr,  # [B, T, D] or None
    dper_mask_ptr,  # [N, T, D] or None
    sums_ptr,  # [G, summed, D] fp32, of rows first, first + 1, ...; or None
    groups,
    samples,
    tokens,
    extras,
    first,
    summed,
    dout_stride_n,
    dout_stride_s,
    CLONES: tl.constexpr,
    GROUP: tl.constexpr,  # samples
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,  # divides CLONES
):
    group, chunk, block = program(WIDTH, BLOCK_D)
    if group >= groups:
        return
    d, inside = columns(chunk, WIDTH, BLOCK_D)
    d, inside = d[None, :], inside[None, :]
    # [BLOCK_T]: rows of the extra tokens and the T tokens in one count
    row = first + block * BLOCK_T + tl.arange(0, BLOCK_T)
    t = row - extras
    is_token = (t >= 0) & (t < tokens)
    stored = is_token[:, None] & inside
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for member in range(0, tl.minimum(samples - group * GROUP, GROUP)):
        b = group.to(tl.int64) * GROUP + member
        dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for m in range(0, CLONES, UNROLL):
            # UNROLL versions at a time: all their slots, then all their rows, then what waits for those.
            n = b * CLONES + m
            slots, parts = (), ()
            for i in tl.static_range(UNROLL):
                slots = slots + (tl.load(slot_ptr + (n + i) * tokens + t, mask=is_token, other=-1),)
            for i in tl.static_range(UNROLL):
                s = tl.where(t < 0, row, tl.where(slots[i] >= 0, slots[i] + extras, -1)).to(tl.int64)[:, None]
                # [BLOCK_T, BLOCK_D]
                source = dout_ptr + (n + i) * dout_stride_n + s * dout_stride_s + d
                parts = parts + (tl.load(source, mask=(s >= 0) & inside, other=0.0),)
            for i in tl.static_range(UNROLL):
                if dper_mask_ptr is not None:
                    into = dper_mask_ptr + ((n + i) * tokens + t[:, None]) * WIDTH + d
                    tl.store(into, parts[i], mask=stored)
                dx += parts[i].to(tl.float32)
        if dx_ptr is not None:
            into = dx_ptr + (b * tokens + t[:, None]) * WIDTH + d
            tl.store(into, dx.to(dx_ptr.dtype.element_ty), mask=stored)
        total += dx
    if sums_ptr is not None:
        sum_row = (row - first)[:, None]
        if block * BLOCK_T < summed:
            into = sums_ptr + (group.to(tl.int64) * summed + sum_row) * WIDTH + d
            tl.store(into, total, mask=(sum_row < summed) & inside)


def backward(dout: Tensor, slot: Tensor, clones: int, extras: int, needs: list[bool]) -> Gradients:
    grads = GATHER_BWD.outputs(dout, slot, clones, extras, needs)
    dx, dextra, dpositions, dper_mask = needed(grads, needs)
    (rows, tokens), width = slot.shape, dout.shape[2]
    samples = rows // clones
    # Of the rows [extra tokens, tokens]: the first that is wanted, how many are summed over the samples, and
    # how many have any gradient.
    first = extras if dextra is None else 0
    summed = (extras if dpositions is None else extras + tokens) - first
    visited = (extras if dx is dpositions is dper_mask is None else extras + tokens) - first
    group = 1
    if summed:
        group = max(1 if dpositions is None else SAMPLES_PER_SUM, triton.cdiv(samples, MOST_PARTS))
    groups = triton.cdiv(samples, group)
    sums = new_partials(dout, groups, (dextra, dpositions)) if summed else None
    dout = dense_columns(dout)
    bucket = power_of_two_bucket(rows=rows * tokens, width=width, bytes=dout.element_size())
    shapes = tiles("BLOCK_T", dout.element_size())
    # eight rows under way in two warps would spill
    candidates = [
        tile | {"UNROLL": unroll}
        for unroll in (4, 8, 2)
        for tile in shapes
        if unroll < 8 or tile["num_warps"] > 2
    ]
    config = choose("gather_bwd_kernel_rows", bucket, candidates)
    config = config | {"UNROLL": math.gcd(clones, config["UNROLL"])}
    chunk = chunk_of(width)
    launch(
        gather_bwd_kernel_rows,
        grid(groups, visited, config["BLOCK_T"], width, chunk),
        dout,
        slot.contiguous(),
        dx,
        dper_mask,
        sums,
        groups,
        samples,
        tokens,
        extras,
        first,
        summed,
        *dout.stride()[:2],
        CLONES=clones,
        GROUP=group,
        WIDTH=width,
        BLOCK_D=chunk,
        fp_fusion=False,
        **config,
    )
    if sums is not None:
        column_sums(sums, (dextra, dpositions))
    return grads
