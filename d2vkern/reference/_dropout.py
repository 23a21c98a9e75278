"""Keep-masks for dropout: 16 random bits a decision, so `p` is rounded to a multiple of 2^-16.

With a seed, an int or a 0-dim int64 tensor, the bits come from the counter-based generator and are equal in
every backend:

    dropout  c0, c1 = low and high word of e // 8, c2 = 0, c3 = purpose << 30     (element e, purpose 3)
             element e reads half-word e % 8 of the counter's 128 bits, low half of a word first;
             it is kept when those bits are >= round(p * 2^16)

Without one they come from torch's generator, on a CPU in 64-bit draws of four decisions each: several times
faster there than `bernoulli_`, which draws one element at a time.
"""

import math

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range

from .philox import DROPOUT, WORD, indices, philox, split64


def fresh_seed() -> int:
    """A seed drawn from torch's default generator, so that `torch.manual_seed` governs dropout."""
    return int(torch.randint(2**62, ()))


def keep_mask(
    shape: tuple[int, ...],
    p: float,
    device: torch.device,
    seed: int | Tensor | None = None,
    first: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bool mask of `shape`, False with probability `p`.

    seed: counter-based bits; None takes them from `generator` (torch's default one when that is None too).
    first: flat index of the first element within a larger tensor whose mask is made in parts.
    """
    count = math.prod(shape)
    threshold = round(p * 65536)
    if seed is not None:
        return (_counter_bits(count, seed, first, device) >= threshold).view(shape)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        return (draws.view(torch.int16)[:count] >= threshold - 32768).view(shape)
    if generator is None:  # with sizes that vary, torch.compile has no `rand` that takes a generator
        return torch.rand(shape, device=device) >= p
    return torch.rand(shape, device=device, generator=generator) >= p


dropout_mask = op_range("dropout/fwd/eager", _costs.dropout)(keep_mask)
"""`keep_mask` outside of another op's range"""


def _counter_bits(count: int, seed: int | Tensor, first: int, device: torch.device) -> Tensor:
    """[count] int64 in 0 .. 2^16 - 1: elements first .. first + count - 1 of the dropout layout."""
    block = indices((first + count + 7) // 8 - first // 8, device) + first // 8
    low, high = split64(block)
    words = torch.stack(philox((low, high, 0, DROPOUT << 30), split64(seed)), -1)
    halves = torch.stack((words & 0xFFFF, (words & WORD) >> 16), -1).flatten()
    return halves[first % 8 : first % 8 + count]
