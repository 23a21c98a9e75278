"""Sums over the rows of a [P, C] fp32 table: the second half of a deterministic column reduction.

In a backward kernel each of P programs sums the columns of its own rows and writes a row of the table; P
follows from the tensor's shape alone. This kernel adds the P rows in an order fixed by P. No atomics, so the
same inputs give the same bits. The C columns may be up to four gradients side by side, each with its dtype.

A program owns BLOCK_C columns and takes BLOCK_P rows at a time, all rows at once where P is at most 256. It
moves 4 P C bytes, usually out of L2, where the first kernel has just written them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._launch import launch

MOST_PARTS = 256
_BLOCK_C = 16


def parts_of(rows: int, least: int) -> int:
    """How many programs share `rows`: as many as get `least` rows each, at most MOST_PARTS."""
    return min(MOST_PARTS, triton.cdiv(rows, least))


def new_partials(like: Tensor, parts: int, outs: Sequence[Tensor | None]) -> Tensor:
    """An uninitialised table for `column_sums`, on the device of `like`."""
    return like.new_empty((parts, sum(out.numel() for out in outs if out is not None)), dtype=torch.float32)


def column_sums(partials: Tensor, outs: Sequence[Tensor | None]) -> None:
    """Write the column sums of `partials` [P, C] into up to four contiguous outs of C elements in all."""
    parts, columns = partials.shape
    parts_of_row = (*outs, None, None, None)[:4]
    launch(
        column_sums_kernel,
        (triton.cdiv(columns, _BLOCK_C),),
        partials,
        *parts_of_row,
        parts,
        columns,
        *(0 if out is None else out.numel() for out in parts_of_row[:3]),
        num_warps=4,
        fp_fusion=True,
        BLOCK_P=MOST_PARTS,
        BLOCK_C=_BLOCK_C,
    )


@triton.jit
def column_sums_kernel(
    partials_ptr,  # [P, C] fp32
    first_ptr,  # [first] or None
    second_ptr,  # [second] or None
    third_ptr,  # [third] or None
    fourth_ptr,  # [C - first - second - third] or None
    parts,
    columns,
    first,
    second,
    third,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < columns
    # [BLOCK_P, BLOCK_C]
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = part.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partials_ptr + at, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
    # [BLOCK_C]
    sums = tl.sum(total, 0)
    if first_ptr is not None:
        tl.store(first_ptr + column, sums.to(first_ptr.dtype.element_ty), mask=column < first)
    if second_ptr is not None:
        place = column - first
        tl.store(
            second_ptr + place, sums.to(second_ptr.dtype.element_ty), mask=(place >= 0) & (place < second)
        )
    if third_ptr is not None:
        place = column - first - second
        tl.store(third_ptr + place, sums.to(third_ptr.dtype.element_ty), mask=(place >= 0) & (place < third))
    if fourth_ptr is not None:
        place = column - first - second - third
        tl.store(fourth_ptr + place, sums.to(fourth_ptr.dtype.element_ty), mask=(place >= 0) & inside)
