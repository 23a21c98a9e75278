"""Keep-masks of dropout: the documented bit layout, probabilities, and what governs them."""

import math

import pytest
import torch

from d2vkern.reference._dropout import fresh_seed, keep_mask
from d2vkern.reference.philox import DROPOUT, philox, split64

CPU = torch.device("cpu")
SEED = 0x1234_5678_9ABC_DEF0


def documented_bits(element: int, seed: int) -> int:
    """16 bits of one element, read off the layout in the docstring."""
    low, high = split64(torch.tensor(element // 8))
    words = philox((low, high, 0, DROPOUT << 30), split64(seed))
    word = int(words[element % 8 // 2])
    return word >> 16 if element % 2 else word & 0xFFFF


@pytest.mark.parametrize("first", [0, 3, 2**35 + 5], ids=["start", "inside a counter", "beyond 2^32"])
def test_counter_bits_follow_the_documented_layout(first: int) -> None:
    p = 0.37
    expected = [documented_bits(first + i, SEED) >= round(p * 65536) for i in range(40)]
    assert keep_mask((40,), p, CPU, SEED, first).tolist() == expected


def test_a_mask_made_in_parts_is_the_whole() -> None:
    whole = keep_mask((5, 7, 3), 0.4, CPU, SEED)
    parts = [keep_mask((7, 3), 0.4, CPU, SEED, first=21 * i) for i in range(5)]
    assert torch.equal(torch.stack(parts), whole)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", [None, SEED], ids=["generator", "counter"])
def test_the_share_dropped(seed: int | None, p: float) -> None:
    n = 200_003
    dropped = n - int(keep_mask((n,), p, CPU, seed).sum())
    share = round(p * 65536) / 65536
    assert abs(dropped - n * share) <= 5 * math.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("seed", [None, SEED], ids=["generator", "counter"])
def test_neighbours_are_independent(seed: int | None) -> None:
    keep = keep_mask((200_000,), 0.5, CPU, seed).double() - 0.5
    for lag in (1, 2, 3, 4, 8, 64):
        correlation = (keep[:-lag] * keep[lag:]).mean() * 4
        assert abs(correlation) < 5 / math.sqrt(200_000)


def test_seeds_give_different_masks() -> None:
    masks = [keep_mask((4096,), 0.5, CPU, seed) for seed in (0, 1, 2**32, SEED)]
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            assert 0.4 < (first == second).double().mean() < 0.6


def test_torchs_generator_governs_masks_without_a_seed() -> None:
    def draw() -> tuple[list[bool], int]:
        return keep_mask((65,), 0.3, CPU).tolist(), fresh_seed()

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert draw() == first and draw() == second and first != second


def test_a_given_generator_is_used_alone() -> None:
    state = torch.get_rng_state()
    masks = [keep_mask((65,), 0.3, CPU, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_leaves_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    keep_mask((65,), 0.3, CPU, SEED)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [None, SEED], ids=["generator", "counter"])
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (1,), (), (2, 3, 5)])
def test_shapes(shape: tuple[int, ...], seed: int | None) -> None:
    keep = keep_mask(shape, 0.5, CPU, seed)
    assert keep.shape == shape and keep.dtype == torch.bool
