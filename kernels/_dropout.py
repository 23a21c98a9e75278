"""Dropout's keep decisions inside a kernel: the bits of d2vkern/reference/_dropout.py, in place.

    c0, c1 = low and high word of e // 8, c2 = 0, c3 = 3 << 30; key: low and high word of the seed
    element e reads half-word e % 8 of the counter's 128 bits, low half of a word first, and is kept when
    those 16 bits are >= round(p * 2^16)

Nothing is stored: forward and backward make the same bits from the same seed. One counter serves eight
elements, so whole counters (`keep_tile`, `keep_span`) cost an eighth of a Philox per element, and their words
reach their elements by interleaving: in registers for 16-bit tensors, where a thread's 16-byte access holds
eight neighbours, through shared memory for fp32. Rows that start within a counter (`keep_rows`) take two
counters per eight elements and shift. `keep_at` takes any elements, at a Philox each.

The seed lies in device memory, so that a replayed CUDA graph can draw anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._common import philox


def draw_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """0-dim int64 tensor on `device`; None draws from the device's default generator."""
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64)
    if seed is None:
        return torch.randint(2**62, (), device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """16-bit values below it are dropped."""
    return round(p * 65536)


def dropout_scale(*probabilities: float) -> float:
    """What the kept values are multiplied with."""
    scale = 1.0
    for p in probabilities:
        scale *= 1.0 - p
    return 1.0 / scale


@triton.jit
def keep_tile(rows, first, seed, threshold, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """bool [BLOCK_R, BLOCK_D]: elements rows * WIDTH + first .. first + BLOCK_D - 1; rows int64 [BLOCK_R].

    WIDTH: of a whole row; wherever it is a multiple of 8, `first` and BLOCK_D must be too.
    """
    if WIDTH % 8 == 0:
        block = (rows * (WIDTH // 8))[:, None] + (first // 8 + tl.arange(0, BLOCK_D // 8))[None, :]
        return _keep_eight(block, seed, threshold)
    else:
        return keep_at((rows * WIDTH)[:, None] + (first + tl.arange(0, BLOCK_D))[None, :], seed, threshold)


@triton.jit
def keep_span(block, seed, threshold, BLOCK: tl.constexpr):
    """bool [BLOCK]: elements 8 * block .. 8 * block + BLOCK - 1; block is an int64 scalar."""
    return _keep_eight(block + tl.arange(0, BLOCK // 8), seed, threshold)


@triton.jit
def keep_rows(first, seed, threshold, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """bool [BLOCK_R, BLOCK]: elements first .. first + BLOCK - 1 of each row; first int64 [BLOCK_R].

    ALIGNED: every `first` is a multiple of 8.
    """
    block = (first >> 3)[:, None] + tl.arange(0, BLOCK // 8)[None, :]
    if ALIGNED:
        return _keep_eight(block, seed, threshold)
    else:
        w0, w1, w2, w3 = _words(block, seed)
        w4, w5, w6, w7 = _words(block + 1, seed)
        # The eight half-words from number `place` on: by four, by two, by one.
        place = (first & 7).to(tl.int32)[:, None]
        by = (place & 4) != 0
        w0, w1, w2 = tl.where(by, w2, w0), tl.where(by, w3, w1), tl.where(by, w4, w2)
        w3, w4, w5 = tl.where(by, w5, w3), tl.where(by, w6, w4), tl.where(by, w7, w5)
        by = (place & 2) != 0
        w0, w1, w2 = tl.where(by, w1, w0), tl.where(by, w2, w1), tl.where(by, w3, w2)
        w3, w4 = tl.where(by, w4, w3), tl.where(by, w5, w4)
        by = (place & 1) != 0
        w0 = tl.where(by, (w0 >> 16) | (w1 << 16), w0)
        w1 = tl.where(by, (w1 >> 16) | (w2 << 16), w1)
        w2 = tl.where(by, (w2 >> 16) | (w3 << 16), w2)
        w3 = tl.where(by, (w3 >> 16) | (w4 << 16), w3)
        return _keep_words(w0, w1, w2, w3, threshold)


@triton.jit
def keep_at(element, seed, threshold):
    """bool like `element`, int64 of any shape."""
    w0, w1, w2, w3 = _words(element >> 3, seed)
    place = (element & 7).to(tl.int32)
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    return tl.where(place % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32) >= threshold


@triton.jit
def sample_factor(row, group, seed, scale, threshold, HAS_PATH: tl.constexpr):
    """fp32 [BLOCK_R, 1]: the scale, or 0 for rows of samples that lose their update; `group` rows each."""
    factor = tl.zeros_like(row).to(tl.float32) + scale
    if HAS_PATH:
        factor = tl.where(keep_at((row // group).to(tl.int64), seed ^ 1, threshold), factor, 0.0)
    return factor[:, None]


@triton.jit
def _keep_eight(block, seed, threshold):
    """bool [..., 8 n] of counters [..., n]."""
    w0, w1, w2, w3 = _words(block, seed)
    return _keep_words(w0, w1, w2, w3, threshold)


@triton.jit
def _keep_words(w0, w1, w2, w3, threshold):
    """bool [..., 8 n] of words [..., n]."""
    # [..., 4 n]: w0, w1, w2, w3 of the first counter, and so on
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave(word & 0xFFFF, word >> 16).to(tl.int32) >= threshold


@triton.jit
def _words(block, seed):
    """The four words of counters `block`, int64 of any shape; seed: int64 scalar."""
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    purpose = zero + tl.full((), 3 << 30, tl.uint32)
    return philox(low, high, zero, purpose, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
