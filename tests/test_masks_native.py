"""The compiled masks: eager's bits for every sampler and setting, on any number of threads."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from d2vkern import inverse_block_mask, random_mask, span_mask
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.testing import assert_bitwise_equal, backend_spy

from .native_common import LEVELS, cpu_level, threads

# name: (sampler, its settings)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "image_base": (inverse_block_mask, {"grid": (14, 14), "prob": 0.8, "length": 3, "adjust": 0.07}),
    "image, even squares": (inverse_block_mask, {"grid": (7, 9), "prob": 0.75, "length": 4}),
    "image, one row": (inverse_block_mask, {"grid": (1, 13), "prob": 0.6, "length": 2}),
    "image, squares wider than the grid": (inverse_block_mask, {"grid": (40, 2), "prob": 0.5, "length": 5}),
    "image, no square fits in": (inverse_block_mask, {"grid": (3, 3), "prob": 0.5, "length": 40}),
    "audio_base": (span_mask, {"tokens": 325, "prob": 0.5, "length": 5, "adjust": 0.05}),
    "audio, long spans": (span_mask, {"tokens": 50, "prob": 0.3, "length": 49}),
    "audio, too many spans": (span_mask, {"tokens": 64, "prob": 0.2, "length": 3, "adjust": 0.7}),
    "audio, minutes": (span_mask, {"tokens": 9001, "prob": 0.5, "length": 10}),
    "text_base": (random_mask, {"tokens": 512, "prob": 0.48}),
    "text, prime": (random_mask, {"tokens": 31, "prob": 0.9}),
    "text, one of two": (random_mask, {"tokens": 2, "prob": 0.5}),
}
PARTS = ("mask", "ids_keep", "slot")
fwd = torch.ops.d2vkern_native.masks_fwd


def ids() -> Tensor:
    return torch.tensor([0, 5, -3, 2**40 + 7])


def assert_same(name: str, samples: Tensor, clones: int, **more: Any) -> None:
    sampler, settings = CASES[name]
    with backend_spy() as calls:
        ours = sampler(samples, clones, **settings, **more, backend="native")
    assert calls == [("masks", "native")]
    theirs = sampler(samples, clones, **settings, **more, backend="eager")
    for part in PARTS:
        assert getattr(ours, part).is_contiguous()
        assert_bitwise_equal(getattr(ours, part), getattr(theirs, part))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name: str, level: int, poisoned_empty: None) -> None:
    with cpu_level(level):
        assert_same(name, ids(), 3, seed=2**63 - 5, epoch=2**32 - 1)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63)])
@pytest.mark.parametrize("epoch", [0, 7, 2**31])
def test_seeds_and_epochs(seed: int, epoch: int) -> None:
    for name in ("image, even squares", "audio, long spans", "text, prime"):
        assert_same(name, ids(), 2, seed=seed, epoch=epoch)
        assert_same(name, ids(), 2, seed=torch.tensor(seed), epoch=torch.tensor(epoch))


def test_of_an_epoch_tensor_the_low_half_counts() -> None:
    assert_same("text, prime", ids(), 2, epoch=torch.tensor(2**32 + 5))
    make = functools.partial(random_mask, ids(), 2, 31, prob=0.9, backend="native")
    assert_bitwise_equal(make(epoch=torch.tensor(2**32 + 5)).mask, make(epoch=5).mask)


def test_ids_of_any_stride_and_no_samples() -> None:
    assert_same("text, prime", torch.arange(20)[::3], 4, seed=1)
    assert_same("image, even squares", torch.arange(0), 4, seed=1)
    assert_same("audio_base", torch.arange(1), 1, seed=1)


def test_threads_change_no_bit() -> None:
    masks = []
    for count in (1, 2):
        with threads(count):
            masks.append(
                inverse_block_mask(torch.arange(64), 8, (14, 14), prob=0.8, length=3, backend="native")
            )
    for part in PARTS:
        assert_bitwise_equal(getattr(masks[0], part), getattr(masks[1], part))


def test_refusals_of_the_registered_op() -> None:
    good = (torch.arange(2), None, None, [0, 0, 0], 2, [1, 8], [1, 1], 0, 4, True)
    for position, value, words in (
        (0, torch.arange(2).int(), "masks: ids must have dtype Long, got Int"),
        (0, torch.zeros(2, 2, dtype=torch.int64), r"masks: ids must have shape \(any\), got \(2, 2\)"),
        (1, torch.zeros(2, dtype=torch.int64), "masks: seed must be one number of the CPU"),
        (2, torch.tensor(1.0), "masks: epoch must have dtype Long, got Float"),
        (3, [0, 0], "masks: words must have 3 numbers, grid and block 2"),
        (4, 0, "masks: clones must be >= 1 and <= 4096, got 0"),
        (5, [0, 8], "masks: grid must have at least 1 and at most 524288 cells, got 0 x 8"),
        (5, [2**40, 2**40], "masks: grid must have at least 1"),
        (6, [1, 0], "masks: block must be >= 1, got 1 x 0"),
        (7, -1, "masks: centres must be >= 0"),
        (8, 9, "masks: target must be >= 0 and <= 8, got 9"),
    ):
        with pytest.raises(ValueError, match=words):
            fwd(*good[:position], value, *good[position + 1 :])


def test_range_and_work() -> None:
    with force_ranges(True), tally_costs() as tallies:
        random_mask(torch.arange(2), 3, 10, prob=0.6, backend="native")
    assert {name: tally.bytes for name, tally in tallies.items()} == {"masks/fwd/native": 16 + 6 * (50 + 16)}


def test_opcheck() -> None:
    torch.library.opcheck(
        fwd.default, (torch.arange(2), None, None, [1, 2, 3], 2, [2, 4], [2, 2], 1, 4, True)
    )
    words = torch.tensor(5), torch.tensor(6)
    torch.library.opcheck(fwd.default, (torch.arange(2), *words, [0, 0, 0], 2, [1, 9], [1, 3], 2, 4, False))


@pytest.mark.parametrize("name", ["image, even squares", "audio_base", "text, prime"])
def test_fullgraph(name: str) -> None:
    sampler, settings = CASES[name]

    def make(samples: Tensor) -> tuple[Tensor, ...]:
        plan = sampler(samples, 3, **settings, seed=4, backend="native")
        return tuple(getattr(plan, part) for part in PARTS)

    torch._dynamo.reset()
    compiled = torch.compile(make, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (5, 8):
        for actual, expected in zip(compiled(torch.arange(count)), make(torch.arange(count)), strict=True):
            assert_bitwise_equal(actual, expected)
