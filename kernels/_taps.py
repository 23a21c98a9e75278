"""Convolutions as matrix products over shifted rows: what the kernels of conv_block share.

x [N, H, W, C] is read as rows of C channels. An output at row r is a sum over taps (kh, kw) and the channels
of its group, so K = KH KW (C / groups) runs over (tap, channel): tap k // IN, channel k % IN. Where 8 divides
IN a thread's 16 bytes never straddle a tap, and copies into shared memory stay 128 bits wide. Taps beyond
the edge are masked: nothing is padded in memory. A row is read once per tap, through L1 (`.ca`).

SPAN > 1 packs SPAN adjacent outputs of a line into the columns of the product: the window grows to
KW + SPAN - 1 taps, the weights become a band (Toeplitz) matrix [KH (KW + SPAN - 1) IN, SPAN OUT] with zeros
off the band. Where OUT is no power of two that wastes less than padding the columns: 48 columns fill 64, but
2 x 48 are 64 + 32.

Weights are packed once per call and cast on the way: [groups, K, COLUMNS], columns padded with zeros to whole
tiles. The gradient of x is the same product with taps mirrored and both channel dimensions exchanged.

`bits` serves a masked input that is never formed: bit s of row r says whether tap s of its window exists and
is not masked. It is a table of 4 bytes a row, made once per call, for windows of up to 32 taps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._launch import MULTIPROCESSORS, launch
from d2vkern.kernels._tuning import Config

MOST_TAPS = 32
"""of a window that `bits` can describe"""


@dataclass(frozen=True, kw_only=True)
class Taps:
    """A product: which channels of a source meet which outputs over which window."""

    groups: int
    inner: int
    """channels per group of the source, IN"""
    outer: int
    """outputs per group, OUT"""
    kh: int
    kw: int
    pad_h: int
    pad_w: int
    mirrored: bool = False
    """the gradient's product"""

    @staticmethod
    def of(weight: Tensor, groups: int) -> "Taps":
        """The forward product of weight [O, C / groups, kh, kw]."""
        outs, inner, kh, kw = weight.shape
        return Taps(
            groups=groups, inner=inner, outer=outs // groups, kh=kh, kw=kw, pad_h=kh // 2, pad_w=kw // 2
        )

    def gradient(self) -> "Taps":
        """The product that takes the gradient of the output to that of the source."""
        return replace(
            self,
            inner=self.outer,
            outer=self.inner,
            pad_h=self.kh - 1 - self.pad_h,
            pad_w=self.kw - 1 - self.pad_w,
            mirrored=not self.mirrored,
        )

    @property
    def constexprs(self) -> dict[str, int]:
        """As the kernels take them."""
        return {
            "GROUPS": self.groups,
            "IN": self.inner,
            "OUT": self.outer,
            "KH": self.kh,
            "KW": self.kw,
            "PAD_H": self.pad_h,
            "PAD_W": self.pad_w,
        }

    def depth(self, span: int = 1) -> int:
        """K."""
        return self.kh * (self.kw + span - 1) * self.inner


def grouped(x: Tensor, groups: int) -> Tensor:
    """[.., C] as [.., groups, C / groups], rows as a program reads them."""
    return x.view(*x.shape[:-1], groups, x.shape[-1] // groups)


@dataclass(frozen=True)
class Places:
    """Where outputs are: all of [samples, height, width], or index [samples, picked] of one line each."""

    samples: int
    height: int
    width: int
    index: Tensor | None = None

    @property
    def picked(self) -> int:
        """Outputs of a sample."""
        return self.height * self.width if self.index is None else self.index.shape[1]

    @property
    def outputs(self) -> int:
        return self.samples * self.picked

    def blocks(self, span: int) -> int:
        """Blocks of up to `span` outputs next to each other."""
        if self.index is not None:
            return self.outputs
        return self.samples * self.height * triton.cdiv(self.width, span)


def column_tiles(columns: int, most: int) -> tuple[int, int]:
    """Widths of a program's one or two tiles of columns, powers of two: 96 are 64 + 32."""
    tile = max(16, triton.next_power_of_2(min(columns, most)))
    if 64 < columns <= 3 * tile // 4:
        return tile // 2, tile // 4
    return tile, 0


def spans(taps: Taps, block_k: int, most: int) -> list[int]:
    """How many outputs to pack into the columns, the cheapest first.

    A matrix instruction of 64 rows, n columns and depth 16 takes n / 2 clocks, or the 16 + n / 4 that its
    operands take to come from shared memory. A span of twice the width must win by a twentieth.
    """

    def clocks(span: int) -> float:
        tiles = column_tiles(span * taps.outer, most)
        per_k = sum(max(n / 2, 16 + n / 4) for n in tiles if n)
        return triton.cdiv(taps.depth(span), block_k) * per_k / span * 1.05 ** (span.bit_length() - 1)

    possible = [span for span in (1, 2) if span * taps.outer <= most]
    return sorted(possible or [1], key=clocks)


def product_configs(
    taps: Taps, places: Places, itemsize: int, *, owner: bool, spread: bool = True, added: bool = False
) -> Sequence[Config]:
    """Tiles of a product, the first for where nothing was measured.

    owner: a program has all columns of a group. spread: outputs may be packed (SPAN). added: an addend of the
    tile's size waits in registers too.
    """
    low = itemsize < 4
    block_k = min(64 if low else 16, max(16, triton.next_power_of_2(taps.depth())))
    most = 64 if not low else 128 if added else 256
    if owner:
        most = max(most, triton.next_power_of_2(taps.outer))
    packed = spans(taps, block_k, most) if spread and places.index is None else [1]
    found = []
    for span in packed:
        first, second = column_tiles(span * taps.outer, most)
        few = triton.cdiv(places.blocks(span), 128) < 264
        heights = [64] if not low else [64, 128] if few and owner else [128, 64]
        for height in heights:
            # Products in fp32 are additions in registers, of which eight warps have enough.
            warps = 4 if low and height == 64 and first <= 128 else 8
            tiles = {"SPAN": span, "BLOCK_M": height, "BLOCK_N": first, "BLOCK_N2": second}
            found.append({**tiles, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 3})
    return found


def packed_weights(weight: Tensor, taps: Taps, config: Config, dtype: torch.dtype) -> Tensor:
    """[groups, K, COLUMNS] of weight [O, C / groups, kh, kw] for a product's tiles."""
    span = config["SPAN"]
    tile = config["BLOCK_N"] + config["BLOCK_N2"]
    columns = triton.cdiv(span * taps.outer, tile) * tile
    out = weight.new_empty((taps.groups, taps.depth(span), columns), dtype=dtype)
    block_i, block_n = min(32, triton.next_power_of_2(taps.inner)), min(64, triton.next_power_of_2(columns))
    tiles = (triton.cdiv(columns, block_n), triton.cdiv(taps.inner, block_i), taps.groups)
    parts = tap_parts(taps.kh * (taps.kw + span - 1), tiles)
    launch(
        taps_weights_kernel,
        (tiles[0] * parts, *tiles[1:]),
        weight.contiguous(),
        out,
        num_warps=4,
        IN=taps.inner,
        OUT=taps.outer,
        KH=taps.kh,
        KW=taps.kw,
        SPAN=span,
        COLUMNS=columns,
        MIRRORED=taps.mirrored,
        PARTS=parts,
        BLOCK_I=block_i,
        BLOCK_N=block_n,
    )
    return out


def tap_parts(taps: int, tiles: tuple[int, int, int]) -> int:
    """How many programs share the taps of a tile of weights: so many that a GPU's multiprocessors get work.

    All taps of a weight lie next to each other, so fewer programs read less. But a small weight is a matter
    of latency alone, and its programs should not walk over taps one after another.
    """
    return min(taps, max(1, 4 * MULTIPROCESSORS // math.prod(tiles)))


@triton.jit
def taps_weights_kernel(
    weight_ptr,  # [groups * OUT, IN, KH, KW]; mirrored: [groups * IN, OUT, KH, KW]
    out_ptr,  # [groups, KH * (KW + SPAN - 1) * IN, COLUMNS]
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SPAN: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIRRORED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program packs BLOCK_I channels by BLOCK_N columns of every PARTS-th tap."""
    WINDOW: tl.constexpr = KW + SPAN - 1
    group = tl.program_id(2)
    # [BLOCK_I, 1] and [1, BLOCK_N]
    channel = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None]
    column = (tl.program_id(0) // PARTS * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    output, shift = column % OUT, column // OUT
    if MIRRORED:
        row = ((group * IN + channel) * OUT + output) * (KH * KW)
    else:
        row = ((group * OUT + output) * IN + channel) * (KH * KW)
    inside = (channel < IN) & (column < SPAN * OUT)
    for tap in range(tl.program_id(0) % PARTS, KH * WINDOW, PARTS):
        tap_w = tap % WINDOW - shift
        if MIRRORED:
            source = row + (KH - 1 - tap // WINDOW) * KW + (KW - 1 - tap_w)
        else:
            source = row + tap // WINDOW * KW + tap_w
        b_weight = tl.load(weight_ptr + source, mask=inside & (tap_w >= 0) & (tap_w < KW), other=0.0)
        at = ((group * KH * WINDOW + tap) * IN + channel) * COLUMNS + column
        written = (channel < IN) & (column < COLUMNS)
        tl.store(out_ptr + at, b_weight.to(out_ptr.dtype.element_ty), mask=written)


def tap_bits(mask_NT: Tensor | None, taps: Taps, span: int = 1) -> Tensor | None:
    """[N, T] int32: which taps of each place's window are inside and not masked."""
    if mask_NT is None:
        return None
    rows, width = mask_NT.shape
    out = mask_NT.new_empty((rows, width), dtype=torch.int32)
    launch(
        taps_bits_kernel,
        (triton.cdiv(rows * width, 256),),
        mask_NT.contiguous().view(torch.uint8),
        out,
        rows * width,
        width,
        num_warps=4,
        WINDOW=taps.kw + span - 1,
        PAD_W=taps.pad_w,
        BLOCK=256,
    )
    return out


@triton.jit(do_not_specialize=["rows", "width"])
def taps_bits_kernel(
    mask_ptr,  # [N, T] uint8, 1: masked
    out_ptr,  # [N, T] int32
    rows,
    width,
    WINDOW: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # [BLOCK]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = row % width
    bits = tl.zeros([BLOCK], tl.int32)
    for tap in range(WINDOW):
        shift = tap - PAD_W
        inside = (row < rows) & (w + shift >= 0) & (w + shift < width)
        kept = tl.load(mask_ptr + row + shift, mask=inside, other=1) == 0
        bits |= kept.to(tl.int32) << tap
    tl.store(out_ptr + row, bits, mask=row < rows)


@triton.jit
def share_of(rows, share, shares):
    """First row of one of even shares, and the row after its last, without 64-bit division."""
    least, more = rows // shares, rows % shares
    return share * least + tl.minimum(share, more), (share + 1) * least + tl.minimum(share + 1, more)


@triton.jit
def first_places(block, blocks, index_ptr, height, width, picked, SPAN: tl.constexpr):
    """Of blocks of SPAN outputs: the first one's row in [N H W], and its h and w; int32."""
    if index_ptr is not None:
        w = tl.load(index_ptr + block, mask=block < blocks, other=0).to(tl.int32)
        return block // picked * width + w, w * 0, w
    else:
        across = (width + SPAN - 1) // SPAN
        line = block // across
        w = (block - line * across) * SPAN
        return line * width + w, line % height, w


@triton.jit
def tap_offsets(k, width, C: tl.constexpr, IN: tl.constexpr, KH: tl.constexpr, WINDOW: tl.constexpr,
                PAD_H: tl.constexpr, PAD_W: tl.constexpr):  # fmt: skip
    """Of positions k along K: tap, its shift in h and w, distance in elements from the place itself."""
    tap = k // IN
    if KH == 1:
        dh, dw = tap * 0, tap - PAD_W
        distance = dw * C + k % IN
    else:
        dh, dw = tap // WINDOW - PAD_H, tap % WINDOW - PAD_W
        distance = (dh * width + dw) * C + k % IN
    return tap, dh, dw, distance


@triton.jit
def taps_inside(tap, dh, dw, h, w, live, bits, height, width, KH: tl.constexpr, HAS_BITS: tl.constexpr):
    """bool: which taps of which places can be read. tap, dh, dw are [1, .]; the places' are [., 1]."""
    if HAS_BITS:
        inside = live & (((bits >> tl.minimum(tap, 31)) & 1) != 0)
    else:
        inside = live & (w + dw >= 0) & (w + dw < width)
        if KH > 1:
            inside &= (h + dh >= 0) & (h + dh < height)
    return inside


@triton.jit
def taps_product(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    rest,  # [BLOCK_M, BLOCK_N2 or 16] fp32, untouched where BLOCK_N2 is 0
    source_ptrs,  # [BLOCK_M]: the first channel of the group at each place
    weight_ptr,  # the first of the tile's columns in the group's packed weights
    h,
    w,
    live,
    bits,
    height,
    width,
    C: tl.constexpr,
    IN: tl.constexpr,
    KH: tl.constexpr,
    WINDOW: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BITS: tl.constexpr,
):
    """Add the product over all taps and the channels of a group."""
    K: tl.constexpr = KH * WINDOW * IN
    for start in range(0, K, BLOCK_K):
        # [BLOCK_K]
        k = start + tl.arange(0, BLOCK_K)
        tap, dh, dw, distance = tap_offsets(k, width, C, IN, KH, WINDOW, PAD_H, PAD_W)
        inside = taps_inside(
            tap[None, :], dh[None, :], dw[None, :], h[:, None], w[:, None], live[:, None], bits[:, None],
            height, width, KH, HAS_BITS,
        )  # fmt: skip
        weights = weight_ptr + k[:, None] * COLUMNS
        # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
        if K % BLOCK_K == 0:
            b_weight = tl.load(weights + tl.arange(0, BLOCK_N)[None, :])
        else:
            inside &= (k < K)[None, :]
            b_weight = tl.load(weights + tl.arange(0, BLOCK_N)[None, :], mask=(k < K)[:, None], other=0.0)
        b_source = tl.load(
            source_ptrs[:, None] + distance[None, :], mask=inside, other=0.0, cache_modifier=".ca"
        )
        acc = tl.dot(b_source, b_weight, acc, input_precision="ieee")
        if BLOCK_N2 > 0:
            weights += BLOCK_N
            further = weights + tl.arange(0, BLOCK_N2)[None, :]
            if K % BLOCK_K == 0:
                b_weight2 = tl.load(further)
            else:
                b_weight2 = tl.load(further, mask=(k < K)[:, None], other=0.0)
            rest = tl.dot(b_source, b_weight2, rest, input_precision="ieee")
    return acc, rest


@triton.jit
def output_columns(first, OUT: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Of BLOCK columns from `first` on: the output of the block they belong to, its channel, which exist."""
    column = first + tl.arange(0, BLOCK)
    if SPAN == 1:
        return column * 0, column, column < OUT
    else:
        return column // OUT, column % OUT, column < SPAN * OUT
