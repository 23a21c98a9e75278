"""Philox 4x32-10 on tensors: the counter-based generator behind masks and decoder noise.

Why counters: a draw is a pure function of (key, counter), so a sample's masks depend on nothing but its own
identity, whatever the batch, its order or the number of processes, and every backend can reproduce them.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011) and its Random123 vectors.

Layout, the contract that csrc/philox.cuh and the Triton twins follow bit for bit. All words are uint32.

    key      k0 = seed low, k1 = seed high          (the 64 bits of the user's seed, two's complement)

    masks    c0 = id low, c1 = id high              (the 64 bits of the sample id)
             c2 = epoch                             (0 .. 2^32 - 1)
             c3 = purpose << 30 | m << 18 | q       (m: clone, 12 bits; q: index of the counter, 18 bits)
             draw j of a row is word j % 4 of counter q = j // 4

    noise    c0 = d // 4, c1 = t, c2 = n            (element [n, t, d] of the decoder input)
             c3 = purpose << 30
             element d takes normal d % 4 of its counter

    purpose  0 block centres, 1 priorities, 2 decoder noise, 3 dropout

The layouts are injective: no two draws of one seed share a counter. From words to values:

    below(w, L) = (w * L) >> 32          each of the L values has a probability within 2^-32 of 1 / L
    normal      r = sqrt(-2 ln(((a >> 8) + 1) * 2^-24)), phi = fp32(2 pi 2^-24) * (b >> 8),
                words (a, b) of (w0, w1) give normals 0 and 1 = r cos phi, r sin phi; (w2, w3) give 2 and 3.
                The argument of ln is never 0; the largest normal is 5.77.

Words are int64 tensors holding 0 .. 2^32 - 1 (torch has no uint32 arithmetic on every device). The product of
two words would overflow int64, which C++ leaves undefined. So the multipliers are taken as M' = M - 2^32:
c * M' fits, its low word is that of c * M, and (c * M) >> 32 is exactly ((c * M') >> 32) + c.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

CENTRES, PRIORITIES, NOISE, DROPOUT = range(4)

MAX_CLONES = 1 << 12
MAX_DRAWS = 1 << 20
MAX_EPOCH = (1 << 32) - 1

ROUNDS = 10
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

Word = Tensor | int
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> Words:
    """The four output words of each counter.

    counter: four int64 tensors or ints (one at least a tensor) of 32-bit words, broadcast together.
    key: two 32-bit words, ints or 0-dim int64 tensors.
    Returns four int64 tensors of the broadcast shape, each value in 0 .. 2^32 - 1.
    """
    c0, c1, c2, c3 = cast(tuple[Any, Any, Any, Any], counter)
    k0, k1 = key
    m0, m1 = (multiplier - (1 << 32) for multiplier in MULTIPLIERS)
    for step in range(ROUNDS):
        product0, product1 = c0 * m0, c2 * m1
        if step < 3:
            # Each word still depends on a part of the counter only: broadcasting keeps these rounds small.
            high0, high1 = (product0 >> 32) + c0, (product1 >> 32) + c2
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        else:
            high0, high1 = (product0 >> 32).add_(c0), (product1 >> 32).add_(c2)
            c0, c2 = high1.bitwise_xor_(c1).bitwise_xor_(k0), high0.bitwise_xor_(c3).bitwise_xor_(k1)
            c1, c3 = product1.bitwise_and_(WORD), product0.bitwise_and_(WORD)
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def indices(count: int, device: torch.device) -> Tensor:
    """[count] int64 0, 1, 2, ..., to be the first or third word of a counter.

    A running sum: Inductor (torch 2.13) computes `arange` times a constant in 32 bits, where it overflows.
    """
    return torch.ones(count, dtype=torch.int64, device=device).cumsum_(0).sub_(1)


def split64(value: Word) -> tuple[Word, Word]:
    """Low and high 32-bit word of a 64-bit integer (int64 tensor or int), two's complement."""
    return value & WORD, (value >> 32) & WORD


def row_draws(ids: Tensor, clones: int, draws: int, purpose: int, *, seed: Word, epoch: Word) -> Tensor:
    """The first `draws` words of each of the N = B * clones rows, in the masks layout.

    ids: [B] int64 sample ids. seed, epoch: ints or 0-dim int64 tensors; of an epoch the low 32 bits count.
    Returns [N, draws] int64, row b * clones + m for clone m of sample b.
    """
    blocks = -(-draws // 4)
    index = torch.arange(blocks, device=ids.device)
    clone = torch.arange(clones, device=ids.device)[:, None]
    low, high = split64(ids[:, None, None])
    words = philox((low, high, epoch & WORD, purpose << 30 | clone << 18 | index), split64(seed))
    return torch.stack(words, -1).view(ids.shape[0] * clones, 4 * blocks)[:, :draws]


def element_normals(rows: Tensor, tokens: Tensor, width: int, *, seed: Word) -> Tensor:
    """Standard normals of the elements [n, t, 0..width) for R pairs (n, t), in the noise layout.

    rows, tokens: [R] int64. Returns [R, width] fp32.
    """
    words = philox(
        (indices(-(-width // 4), rows.device), tokens[:, None], rows[:, None], NOISE << 30), split64(seed)
    )
    return normal(words).flatten(1)[:, :width]


def below(words: Tensor, bound: int) -> Tensor:
    """int64 integers in [0, bound), 0 < bound <= 2^31; each has a probability within 2^-32 of 1 / bound."""
    return (words * bound) >> 32


def normal(words: Words) -> Tensor:
    """Standard normals by Box-Muller in fp32, four per counter: shape (*words, 4)."""
    out = torch.empty(*words[0].shape, 4, device=words[0].device)
    for pair in (0, 2):
        radius = (words[pair] >> 8).add_(1).float().mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
        angle = (words[pair + 1] >> 8).float().mul_(2.0 * math.pi * 2.0**-24)
        out[..., pair] = torch.cos(angle).mul_(radius)
        out[..., pair + 1] = angle.sin_().mul_(radius)
    return out
