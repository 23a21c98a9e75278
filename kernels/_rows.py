"""Rows of [.., D] tensors in tiles: where they are, how many columns a tile takes, loads along them.

A tile is BLOCK_R rows by CHUNK columns; a row is ceil(D / CHUNK) chunks, which a kernel walks with
`tl.static_range`, keeping them in tuples. A warp's 16-byte loads cover 256 columns of 16 bits or 128 of 32.
Chunks are that wide, so that a warp owns a row and sums it by shuffles, and the widths 768 and 1280 leave no
lane idle (a tile of 1024 lanes would idle a quarter of them at 768). Rows of more chunks than a thread has
registers for go to several warps, in wider chunks.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket


class Rows(NamedTuple):
    """A tensor [samples, group, D] and where its rows are."""

    tensor: Tensor
    group: int
    stride_sample: int
    stride_row: int
    flat: bool
    """whether one stride serves all rows"""


def as_rows(x: Tensor) -> Rows:
    """A view of x, or a copy where its strides allow none or its last dimension is not contiguous."""
    samples, group = x.shape[0] if x.dim() > 1 else 1, math.prod(x.shape[1:-1])
    tensor = x.reshape(samples, group, x.shape[-1])
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    sample, row, _ = tensor.stride()
    row = row if group > 1 else sample
    return Rows(tensor, group, sample, row, samples <= 1 or sample == group * row)


def dense(*vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors over the columns, or whole tensors, contiguous."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def chunk_width(width: int, itemsize: int, most: int) -> int:
    """Columns of a tile: of as few warps as leave a thread at most `most` values of a row."""
    vector = 16 // itemsize
    chunk = 32 * vector
    if width <= chunk:
        return triton.next_power_of_2(width)
    while triton.cdiv(width, chunk) * vector > most and chunk < 16 * 32 * vector:
        chunk *= 2
    return chunk


def row_config(kernel: str, x: Tensor, most: int, loop: bool = False) -> Config:
    """Tile and warps of a kernel over the rows of x, and with `loop` the stages in which it fetches tiles.

    most: values of a row that a thread may hold.
    """
    width, itemsize = x.shape[-1], x.element_size()
    chunk, span = chunk_width(width, itemsize, most), 512 // itemsize
    candidates: list[Config] = []
    for least, tiles in ((4, 1), (8, 1)) if loop else ((4, 1), (4, 2), (8, 1)):
        warps = max(least, chunk // span)
        rows = tiles * warps * span // chunk
        config = {"CHUNK": chunk, "BLOCK_R": rows, "num_warps": warps}
        # Two small tiles ahead, or one of more than 8 KB.
        stages = 3 if rows * width * itemsize <= 8192 else 2
        candidates += [config | {"STAGES": stages + more} for more in (0, -1, 1)] if loop else [config]
    bucket = power_of_two_bucket(rows=x.numel() // width)
    return choose(kernel, f"{bucket} D{width} bytes{itemsize} most{most}", candidates)


@triton.jit
def row_offset(row, group, stride_sample, stride_row, FLAT: tl.constexpr):
    """int64 [BLOCK_R]: where rows begin; FLAT: one stride serves all."""
    if FLAT:
        return row.to(tl.int64) * stride_row
    else:
        return (row // group).to(tl.int64) * stride_sample + (row % group).to(tl.int64) * stride_row


@triton.jit
def tile_columns(first, live, D: tl.constexpr, CHUNK: tl.constexpr):
    """int32 [1, CHUNK]: columns from `first` on; bool [BLOCK_R, CHUNK or 1]: which elements exist."""
    column = (first + tl.arange(0, CHUNK))[None, :]
    inside = live[:, None] if D % CHUNK == 0 else live[:, None] & (column < D)
    return column, inside


@triton.jit
def mean_of(total, D: tl.constexpr):
    """[BLOCK_R, 1]: mean over D columns whose sums stand in the lanes of `total` [BLOCK_R, CHUNK].

    Rounded right, as Triton's `/` is not: a mean next to which deviations are small must be exact, and the
    mean of one value is that value.
    """
    return tl.div_rn(tl.sum(total, 1), D * 1.0)[:, None]


@triton.jit
def mean_near(total, D: tl.constexpr):
    """`mean_of` to a rounding, in one multiplication; still exact for one value."""
    return (tl.sum(total, 1) * (1.0 / D))[:, None]


@triton.jit
def deviations(values, mean, D: tl.constexpr, CHUNK: tl.constexpr):
    """Chunks of a row less its mean [BLOCK_R, 1], 0 beyond the last column, and their variance [BLOCK_R]."""
    centred = ()
    total = tl.zeros_like(values[0])
    for chunk in tl.static_range((D + CHUNK - 1) // CHUNK):
        deviation = values[chunk] - mean
        if D % CHUNK != 0:
            deviation = tl.where((chunk * CHUNK + tl.arange(0, CHUNK) < D)[None, :], deviation, 0.0)
        centred = centred + (deviation,)
        total += deviation * deviation
    return centred, tl.sum(total, 1) / D


@triton.jit
def load_vector(vector_ptr, column, D: tl.constexpr, BLOCK_R: tl.constexpr):
    """fp32 [BLOCK_R, CHUNK]: a vector over the columns, once for each row, in the layout of the rows."""
    at = column + tl.zeros([BLOCK_R, 1], tl.int32)
    return tl.load(vector_ptr + at, mask=at < D, other=0.0).to(tl.float32)


@triton.jit
def replaced(values, index: tl.constexpr, value):
    """The tuple with another value at `index`."""
    return values[:index] + (value,) + values[index + 1 :]
