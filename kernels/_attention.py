"""What the attention kernels share: how a call is laid out, where a head's rows are, its bias and its scores.

Scores are in units of ln 2, so that probabilities are powers of two:

    s_ij = log2(e) (softmax_scale q_i k_j - w |pos_i - pos_j|),  w = slope_h max(alibi_scale_h, 0)

and minus infinity where key j is padding. Distances are exact: integers are subtracted from the sequence's
last position before they become fp32, so only distances of 2^24 and more are rounded. A token with a negative
position has no distance to any other. Per element the bias costs a subtraction, a product and an FMA: what
depends on the query alone (weight, 0 for extra tokens) and on the key alone (1, or 0 for extra tokens; 0, or
minus infinity for padding) stays in vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._common import not_below_zero
from d2vkern.kernels._dropout import dropout_scale, keep_rows, threshold

SHORT = {2: 64, 4: 0}
"""bytes of an element -> tokens that one program takes at once; fp32 products have operands in registers"""


class Inputs(NamedTuple):
    """Tensors of a call."""

    qkv: Tensor  # [N,S,3,H,Dh]
    positions: Tensor | None  # [N,S] int32 or int64
    slopes: Tensor | None  # [H]
    alibi_scale: Tensor | None  # [H]
    lengths: Tensor | None  # [N] int32 or int64
    seed: Tensor | None  # [] int64; None: no dropout


def is_short(qkv: Tensor) -> bool:
    """Whether one program takes a whole sequence."""
    return qkv.shape[1] <= SHORT[qkv.element_size()]


class Call:
    """A call as the kernels want it: what they all take, and the sizes that decide tiles."""

    def __init__(
        self,
        given: Inputs,
        scale: float | None,
        dropout_p: float,
        zero_padded: bool,
        dout: Tensor | None = None,
    ) -> None:
        qkv, positions, slopes, alibi_scale, lengths, seed = given
        if qkv.stride(-1) != 1:
            qkv = qkv.contiguous()
        if slopes is None:
            positions = None
        if positions is not None and positions.stride(1) != 1:
            positions = positions.contiguous()
        self.sequences, self.tokens, _, self.heads, self.width = qkv.shape
        self.qkv = qkv
        self.item = qkv.element_size()
        self.padded_width = max(16, triton.next_power_of_2(self.width))
        self.biased, self.dropped = positions is not None, dropout_p > 0
        self.arguments: tuple[Any, ...] = (
            qkv,
            positions,
            None if slopes is None else slopes.contiguous(),
            None if alibi_scale is None else alibi_scale.contiguous(),
            None if lengths is None else lengths.contiguous(),
            seed if self.dropped else None,
            self.tokens,
            *qkv.stride()[:3],
            0 if positions is None else positions.stride(0),
            self.width**-0.5 if scale is None else scale,
            dropout_scale(dropout_p),
            threshold(dropout_p),
        )
        """from `qkv_ptr` to `dropout_threshold`, in the kernels' order"""
        # Addresses within a sequence are 32-bit numbers where they can be: that saves registers.
        furthest = max(qkv.stride(1), 3 * self.heads * self.width, 0 if dout is None else dout.stride(1))
        self.constants = {
            "HEADS": self.heads,
            # constant, so that the compiler sees how rows are aligned at widths that are no multiple of 16
            "STRIDE_H": qkv.stride(3),
            "WIDTH": self.width,
            "BLOCK_D": self.padded_width,
            "ZERO_PADDED": zero_padded,
            "ALIGNED": self.tokens % 8 == 0,
            "LARGE": self.tokens * furthest >= 2**31,
        }

    @property
    def short(self) -> bool:
        """Whether one program takes a whole sequence."""
        return is_short(self.qkv)


@triton.jit
def sequence_and_head(program, HEADS: tl.constexpr):
    """int64 numbers of the sequence and of the head."""
    return (program // HEADS).to(tl.int64), (program % HEADS).to(tl.int64)


@triton.jit
def counted(lengths_ptr, n, tokens, ZERO_PADDED: tl.constexpr):
    """How many queries and keys of sequence n count; those behind are padding.

    Without a single real key all keys count. Padded queries count where they attend.
    """
    queries = tokens
    keys = tokens
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + n), tokens).to(tl.int32)
        keys = tl.where(length > 0, length, tokens)
        if ZERO_PADDED:
            queries = length
    return queries, keys


@triton.jit
def load_rows(rows_ptr, row, stride, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, LARGE: tl.constexpr):
    """[BLOCK, BLOCK_D]: rows of one head, 0 from row `count` and column WIDTH on.

    LARGE: rows may lie further apart than int32 counts.
    """
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < count)[:, None]
    if WIDTH != BLOCK_D:
        inside = inside & (column < WIDTH)
    if LARGE:
        row = row.to(tl.int64)
    return tl.load(rows_ptr + (row[:, None] * stride + column), mask=inside, other=0.0)


@triton.jit
def products(
    a, a_ptr, a_row, a_stride, a_count, b, b_ptr, b_row, b_stride, b_count,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """fp32 a b' of two blocks of rows, which are also given as `load_rows` takes them.

    Without matrix instructions a thread multiplies whole rows, and a block that stays the same in a loop
    would stay in its registers. So fp32 rows are fetched anew, a few columns at a time.
    """
    if a.dtype != tl.float32:
        return tl.dot(a, tl.trans(b))
    else:
        CHUNK: tl.constexpr = min(BLOCK_D, 32)
        total = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        a_at, b_at = a_row, b_row
        if LARGE:
            a_at, b_at = a_row.to(tl.int64), b_row.to(tl.int64)
        for first in range(0, BLOCK_D, CHUNK):
            column = first + tl.arange(0, CHUNK)[None, :]
            a_inside, b_inside = (a_row < a_count)[:, None], (b_row < b_count)[:, None]
            if WIDTH != BLOCK_D:
                a_inside, b_inside = a_inside & (column < WIDTH), b_inside & (column < WIDTH)
            part = tl.load(a_ptr + (a_at[:, None] * a_stride + column), mask=a_inside, other=0.0)
            other = tl.load(b_ptr + (b_at[:, None] * b_stride + column), mask=b_inside, other=0.0)
            total = tl.dot(part, tl.trans(other), total, input_precision="ieee")
        return total


@triton.jit
def store_rows(
    rows_ptr, row, stride, count, value, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, LARGE: tl.constexpr
):
    """Rows below `count` of one head, in the pointer's dtype."""
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < count)[:, None]
    if WIDTH != BLOCK_D:
        inside = inside & (column < WIDTH)
    if LARGE:
        row = row.to(tl.int64)
    tl.store(rows_ptr + (row[:, None] * stride + column), value.to(rows_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_weight(slopes_ptr, alibi_scale_ptr, h):
    """fp32 scalar log2(e) slope max(alibi_scale, 0); 0 without slopes."""
    weight = 0.0
    if slopes_ptr is not None:
        weight = tl.load(slopes_ptr + h).to(tl.float32) * 1.4426950408889634
        if alibi_scale_ptr is not None:
            weight *= not_below_zero(tl.load(alibi_scale_ptr + h).to(tl.float32))
    return weight


@triton.jit
def load_places(positions_ptr, row, count, tokens):
    """fp32 [BLOCK] positions from the last token's on, and 1 for real tokens, 0 for extra ones.

    positions_ptr: of one sequence; None gives zeros. From row `count` on some finite place: what is read as 0
    can be copied straight into shared memory, and nothing depends on it.
    """
    place = tl.zeros_like(row).to(tl.float32)
    real = place
    if positions_ptr is not None:
        position = tl.load(positions_ptr + row, mask=row < count, other=0)
        place = (position - tl.load(positions_ptr + tokens - 1)).to(tl.float32)
        real = tl.where(position >= 0, 1.0, 0.0)
    return place, real


@triton.jit
def key_bias(key, keys):
    """fp32 [BLOCK]: minus infinity at padded keys."""
    return tl.where(key < keys, 0.0, float("-inf"))


@triton.jit
def distances(place_q, place_k, real_k):
    """fp32, in whichever order the two are broadcast: |pos_i - pos_j|, 0 for extra keys."""
    return tl.abs(place_q - place_k) * real_k


@triton.jit
def scores(qk, bias, scale, place, weight, positions_ptr, others, tokens):
    """fp32 scores [A,B] from products, own tokens along A, and the distances in them (0 without positions).

    bias: `key_bias`, broadcast; scale: with log2(e) in it; place, weight: [A] of the own tokens, see
    `load_places` and `bias_weight`, unused without positions; others: [B] tokens along B.
    """
    s = qk * scale + bias
    distance = tl.zeros_like(s)
    if positions_ptr is not None:
        place_other, real_other = load_places(positions_ptr, others, tokens, tokens)
        distance = distances(place[:, None], place_other[None, :], real_other[None, :])
        s -= distance * weight[:, None]
    return s, distance


@triton.jit
def keep_scores(n, h, row, first, tokens, seed, threshold, HEADS: tl.constexpr, BLOCK: tl.constexpr,
                ALIGNED: tl.constexpr):  # fmt: skip
    """bool [BLOCK_M, BLOCK]: probabilities of queries `row` and keys first .. first + BLOCK - 1 that stay."""
    # [BLOCK_M]: element ((n H + h) S + i) S + j of [N,H,S,S]
    start = ((n * HEADS + h) * tokens + row) * tokens + first
    return keep_rows(start, seed, threshold, BLOCK, ALIGNED)
