"""Gradient of a convolution's weight: dw[o, c, tap] = sum over outputs of x[place + tap, c] dr[output, o].

Per group a product of depth rows: M = (tap, channel) by N = output. A program takes one tile of one group
over one share of the rows, and writes an fp32 partial; a second kernel adds the shares in order, so that the
same inputs give the same bits, and puts the sum into the weight's own layout. The number of shares follows
from the shape: enough for about 1,024 programs, but partials stay below an eighth of the rows' bytes. Large
tiles, of dense layers, are shared so that the last round of programs leaves few multiprocessors idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._launch import busy, launch
from d2vkern.kernels._taps import (
    Places,
    Taps,
    first_places,
    grouped,
    share_of,
    tap_bits,
    tap_offsets,
    tap_parts,
    taps_inside,
)
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket

_PROGRAMS = 1024
_LEAST_ROWS = 512
"""of a share"""
_WHOLE = 128 * 256
"""a tile of so many values has a multiprocessor to itself: a last round that leaves many idle costs much"""
_MOST_SHARES = 6
_FLOPS, _BYTES = 5e14, 3e12
"""a second of such a product, and of the partials, on an H100 or H200"""


@triton.jit(do_not_specialize=["rows", "height", "width", "picked", "clones"])
def taps_weight_kernel(
    x_ptr,  # [N or N / clones, height, width, GROUPS * IN]
    dr_ptr,  # [N * height * width, GROUPS * OUT]
    index_ptr,  # [N, picked]: outputs of a line, or None: all
    bits_ptr,  # [N, width] int32, or None
    partials_ptr,  # [shares, GROUPS, K, OUT] fp32
    rows,
    height,
    width,
    picked,
    clones,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    K: tl.constexpr = KH * KW * IN
    C: tl.constexpr = GROUPS * IN
    TILES_N: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile, group, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = share_of(rows, share, tl.num_programs(2))
    # [BLOCK_M] and [BLOCK_N]
    k = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, dh, dw, distance = tap_offsets(k, width, C, IN, KH, KW, PAD_H, PAD_W)
    group_x_ptr, group_dr_ptr = x_ptr + group * IN, dr_ptr + group * OUT
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_R):
        # [BLOCK_R]
        output = start + tl.arange(0, BLOCK_R)
        live = output < last
        place, h, w = first_places(output, last, index_ptr, height, width, picked, 1)
        source, bits = place, place
        if bits_ptr is not None:
            bits = tl.load(bits_ptr + place, mask=live, other=0)
            source = place // width // clones * width + w
        inside = taps_inside(
            tap[None, :], dh[None, :], dw[None, :], h[:, None], w[:, None], live[:, None], bits[:, None],
            height, width, KH, bits_ptr is not None,
        )  # fmt: skip
        if K % BLOCK_M != 0:
            inside &= (k < K)[None, :]
        # [BLOCK_R, BLOCK_M] and [BLOCK_R, BLOCK_N]
        b_x = tl.load(
            group_x_ptr + source.to(tl.int64)[:, None] * C + distance[None, :],
            mask=inside,
            other=0.0,
            cache_modifier=".ca",
        )
        b_dr = tl.load(
            group_dr_ptr + place.to(tl.int64)[:, None] * (GROUPS * OUT) + column[None, :],
            mask=live[:, None] & (column < OUT)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(b_x), b_dr, acc, input_precision="ieee")
    at = ((share.to(tl.int64) * GROUPS + group) * K + k)[:, None] * OUT + column[None, :]
    tl.store(partials_ptr + at, acc, mask=(k < K)[:, None] & (column < OUT)[None, :])


@triton.jit
def taps_weight_kernel_sum(
    partials_ptr,  # [shares, GROUPS, K, OUT] fp32
    dw_ptr,  # [GROUPS * OUT, IN, TAPS]
    shares,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TAPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program adds up BLOCK_I channels by BLOCK_N outputs of every PARTS-th tap."""
    group = tl.program_id(2)
    # [BLOCK_I, 1] and [1, BLOCK_N]
    channel = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    output = (tl.program_id(0) // PARTS * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (channel < IN) & (output < OUT)
    group64 = group.to(tl.int64)
    for tap in range(tl.program_id(0) % PARTS, TAPS, PARTS):
        total = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
        for share in range(shares):
            row = (share * GROUPS + group64) * (TAPS * IN) + tap * IN + channel
            total += tl.load(partials_ptr + row * OUT + output, mask=inside, other=0.0)
        at = ((group * OUT + output) * IN + channel) * TAPS + tap
        tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=inside)


def _config(taps: Taps, places: Places, itemsize: int, masked: bool) -> Config:
    low = itemsize < 4
    depth, outs = taps.depth(), taps.outer
    if low and outs > 128:
        tiles = [(128, 256, 8, 3), (128, 128, 8, 3)]
    elif low:
        width = max(16, triton.next_power_of_2(outs))
        # A third stage spills on sm_100 with bits to fetch ahead of rows, on sm_80 with few columns.
        stages = 2 if masked or width <= 16 else 3
        tiles = sorted(
            [(64, width, 4, stages), (128, width, 8, stages)],
            key=lambda tile: triton.cdiv(depth, tile[0]) * tile[0],
        )
    else:
        width = min(64, max(16, triton.next_power_of_2(outs)))
        tiles = [(64, width, 8, 2), (32, width, 4, 2)]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    candidates = [{**dict(zip(names, tile, strict=True)), "BLOCK_R": 64 if low else 32} for tile in tiles]
    bucket = f"{power_of_two_bucket(rows=places.outputs)} bytes{itemsize} masked{int(masked)} " + " ".join(
        f"{name}{value}" for name, value in taps.constexprs.items() if not name.startswith("PAD")
    )
    return choose("taps_weight_kernel", bucket, candidates)


def shares_of(taps: Taps, places: Places, itemsize: int, config: Config) -> int:
    """How many programs share the rows of a tile."""
    tiles = triton.cdiv(taps.depth(), config["BLOCK_M"]) * triton.cdiv(taps.outer, config["BLOCK_N"])
    values = taps.groups * taps.depth() * taps.outer
    read = places.outputs * taps.groups * (taps.inner + taps.outer) * itemsize
    # Backward moves the rows three or four times; partials are written and read.
    light = 4 * read // 8 // (8 * values)
    most = max(1, places.outputs // _LEAST_ROWS)
    if config["BLOCK_M"] * config["BLOCK_N"] < _WHOLE:
        return max(1, min(_PROGRAMS // (tiles * taps.groups), most, light))
    products = 2 * places.outputs * values / _FLOPS

    def seconds(shares: int) -> float:
        return products / busy(tiles * taps.groups * shares) + 8 * values * shares / _BYTES

    return min(range(1, min(most, _MOST_SHARES) + 1), key=seconds)


def weight_gradient(
    x: Tensor, dr: Tensor, taps: Taps, places: Places, masked: Tensor | None, clones: int, dw: Tensor
) -> None:
    """Write dw [O, C / groups, kh, kw]; dr: [samples * height * width, O]."""
    config = _config(taps, places, x.element_size(), masked is not None)
    tiles = triton.cdiv(taps.depth(), config["BLOCK_M"]) * triton.cdiv(taps.outer, config["BLOCK_N"])
    shares = shares_of(taps, places, x.element_size(), config)
    partials = x.new_empty((shares, taps.groups, taps.depth(), taps.outer), dtype=torch.float32)
    launch(
        taps_weight_kernel,
        (tiles, taps.groups, shares),
        grouped(x, taps.groups),
        grouped(dr, taps.groups),
        places.index,
        tap_bits(masked, taps),
        partials,
        places.outputs,
        places.height,
        places.width,
        places.picked,
        clones,
        **taps.constexprs,
        **config,
    )
    block_i = min(16, triton.next_power_of_2(taps.inner))
    block_n = min(64, triton.next_power_of_2(taps.outer))
    blocks = (triton.cdiv(taps.outer, block_n), triton.cdiv(taps.inner, block_i), taps.groups)
    parts = tap_parts(taps.kh * taps.kw, blocks)
    launch(
        taps_weight_kernel_sum,
        (blocks[0] * parts, *blocks[1:]),
        partials,
        dw,
        shares,
        num_warps=4,
        GROUPS=taps.groups,
        IN=taps.inner,
        OUT=taps.outer,
        TAPS=taps.kh * taps.kw,
        PARTS=parts,
        BLOCK_I=block_i,
        BLOCK_N=block_n,
    )
