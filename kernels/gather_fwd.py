"""gather_fwd_kernel, and what the programs of gather.py's kernels share; see gather.py."""

import triton
import triton.language as tl
from torch import Tensor

from d2vkern.functions.gather import GATHER_FWD
from d2vkern.kernels._launch import launch
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket

MOST_PROGRAMS = 65535
"""along the second and third axis of a grid"""


# Counts that change from batch to batch compile nothing anew.
@triton.jit(do_not_specialize=["rows", "kept", "extras"])
def gather_fwd_kernel(
    x_ptr,  # [B, T, D]
    ids_ptr,  # [N, K] int32, -1: nothing stands there
    extra_ptr,  # [E, D] or [N, E, D]; None: extra tokens are 0
    positions_ptr,  # [T, D] or None
    per_mask_ptr,  # [N, T, D] or None
    out_ptr,  # [N, E + K, D]
    rows,
    kept,
    extras,
    x_stride_b,
    x_stride_t,
    extra_stride_n,  # None: the same for all rows
    extra_stride_e,
    positions_stride_t,
    per_mask_stride_n,
    per_mask_stride_t,
    CLONES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n, chunk, block = program(WIDTH, BLOCK_D)
    if n >= rows:
        return
    d, inside = columns(chunk, WIDTH, BLOCK_D)
    d, inside = d[None, :], inside[None, :]
    # [BLOCK_S]
    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    k = s - extras
    seen = (k >= 0) & (k < kept)
    n = n.to(tl.int64)
    t = tl.load(ids_ptr + n * kept + k, mask=seen, other=-1).to(tl.int64)[:, None]
    seen = (t >= 0) & inside
    # [BLOCK_S, BLOCK_D]
    out = tl.load(x_ptr + n // CLONES * x_stride_b + t * x_stride_t + d, mask=seen, other=0.0)
    if positions_ptr is not None:
        out = _add(out, tl.load(positions_ptr + t * positions_stride_t + d, mask=seen, other=0.0))
    if per_mask_ptr is not None:
        per_mask_ptr += n * per_mask_stride_n
        out = _add(out, tl.load(per_mask_ptr + t * per_mask_stride_t + d, mask=seen, other=0.0))
    s = s[:, None]
    if extra_ptr is not None:
        if extra_stride_n is not None:
            extra_ptr += n * extra_stride_n
        source = extra_ptr + s.to(tl.int64) * extra_stride_e + d
        out = tl.where(s < extras, tl.load(source, mask=(s < extras) & inside, other=0.0), out)
    tl.store(out_ptr + (n * (extras + kept) + s) * WIDTH + d, out, mask=(s < extras + kept) & inside)


@triton.jit
def program(WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's row of the grid, chunk of the width, and block; see `grid`."""
    row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    chunks: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    return row, tl.program_id(0) % chunks, tl.program_id(0) // chunks


@triton.jit
def columns(chunk, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_D]: columns of a chunk, and which of them exist."""
    d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    return d, tl.full([BLOCK_D], True, tl.int1) if WIDTH % BLOCK_D == 0 else d < WIDTH


@triton.jit
def _add(a, b):
    """Rounded to the dtype of both."""
    return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)


def forward(
    x: Tensor,
    ids_keep: Tensor,
    clones: int,
    extra: Tensor | None,
    positions: Tensor | None,
    per_mask: Tensor | None,
) -> Tensor:
    out = GATHER_FWD.outputs(x, ids_keep, clones, extra, positions, per_mask)
    pick(out, x, ids_keep, clones, extra, positions, per_mask)
    return out


def pick(
    out: Tensor,
    x: Tensor,
    ids_keep: Tensor,
    clones: int,
    extra: Tensor | None = None,
    positions: Tensor | None = None,
    per_mask: Tensor | None = None,
) -> None:
    """Write out [N, E + K, D]; without `extra` [E, D] or [N, E, D] its first rows become 0."""
    (rows, seen, width), kept = out.shape, ids_keep.shape[1]
    x, extra, positions, per_mask = (dense_columns(part) for part in (x, extra, positions, per_mask))
    bucket = power_of_two_bucket(rows=rows * seen, width=width, bytes=x.element_size())
    config = choose("gather_fwd_kernel", bucket, tiles("BLOCK_S", x.element_size()))
    chunk = chunk_of(width)
    launch(
        gather_fwd_kernel,
        grid(rows, seen, config["BLOCK_S"], width, chunk),
        x,
        ids_keep.contiguous(),
        extra,
        positions,
        per_mask,
        out,
        rows,
        kept,
        seen - kept,
        *x.stride()[:2],
        extra.stride(0) if extra is not None and extra.dim() == 3 else None,
        *_row_strides(extra, 1),
        *_row_strides(positions, 1),
        *_row_strides(per_mask, 2),
        CLONES=clones,
        WIDTH=width,
        BLOCK_D=chunk,
        fp_fusion=False,
        **config,
    )


def grid(rows: int, length: int, block: int, width: int, chunk: int) -> tuple[int, int, int]:
    """A program for every chunk of the width, block along the length, and row."""
    blocks = triton.cdiv(length, block) * triton.cdiv(width, chunk)
    return blocks, min(rows, MOST_PROGRAMS), triton.cdiv(rows, MOST_PROGRAMS)


def chunk_of(width: int) -> int:
    """Columns of a chunk: a power of two that divides the width, where there is one that is large enough."""
    for chunk in (256, 128):
        if width % chunk == 0:
            return chunk
    return min(256, max(8, triton.next_power_of_2(width)))


def tiles(block: str, itemsize: int) -> list[Config]:
    """Rows and warps of a tile; by default two accesses of 16 bytes for each of 128 threads."""
    rows = 16 // itemsize
    sizes = ((rows, 4), (rows // 2, 4), (2 * rows, 4), (rows // 2, 2), (rows, 2), (2 * rows, 8))
    return [{block: size, "num_warps": warps, "num_stages": 1} for size, warps in sizes]


def dense_columns(x: Tensor | None) -> Tensor | None:
    """x, or a copy where its last dimension is not contiguous."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _row_strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    """Of the last `count` dimensions before the columns."""
    return (0,) * count if x is None else x.stride()[-1 - count : -1]
