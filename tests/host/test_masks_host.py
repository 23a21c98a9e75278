"""csrc/masks.cuh on a host, by one thread and by teams of them, bit for bit against the reference."""

from types import ModuleType

import numpy as np
import pytest
import torch

from d2vkern.reference import masks as reference
from d2vkern.reference.philox import CENTRES, PRIORITIES, row_draws

ALL_BITS = 0xFFFFFFFF
IDS = torch.tensor([3, -1, 1 << 40])
# height, width, centres, block height, block width, chosen cells, whether those are kept
CASES = {
    "image": (14, 14, 6, 3, 3, 39, True),
    "image, more squares than visible cells": (14, 14, 40, 3, 3, 39, True),
    "even square on an odd grid": (5, 9, 3, 4, 4, 20, True),
    "square larger than the grid": (3, 5, 1, 9, 9, 6, True),
    "speech": (1, 249, 30, 1, 5, 124, False),
    "even span": (1, 250, 40, 1, 10, 125, False),
    "span longer than the row": (1, 10, 2, 1, 100, 5, False),
    "text": (1, 128, 0, 1, 1, 66, True),
    "text, tokens no multiple of four": (1, 33, 0, 1, 1, 17, True),
    "one token kept": (1, 2, 0, 1, 1, 1, True),
    "all but one kept": (1, 67, 0, 1, 1, 66, True),
    "one column": (7, 1, 2, 3, 3, 4, True),
    "the union is the target": (1, 8, 1, 1, 1, 1, False),
}
# 0: one thread, whose storage is the row's own slot and mask; else threads with storage of their own
TEAMS = [0, 1, 3, 8]


def expected_plan(case: tuple[int, ...], clones: int, seed: int, epoch: int) -> reference.MaskTensors:
    height, width, centres, block_height, block_width, target, keep = case
    common = {"seed": seed, "epoch": epoch}
    if keep and centres:
        assert block_height == block_width
        return reference.inverse_block_mask(
            IDS, clones, (height, width), centres=centres, kept=target, length=block_width, **common
        )
    if keep:
        return reference.random_mask(IDS, clones, width, kept=target, **common)
    return reference.span_mask(
        IDS, clones, width, centres=centres, masked=target, length=block_width, **common
    )


def check(actual: tuple[np.ndarray, ...], expected: reference.MaskTensors) -> None:
    for name, one, other in zip(("mask", "ids_keep", "slot"), actual, expected, strict=True):
        np.testing.assert_array_equal(one, other.numpy(), err_msg=name)


@pytest.mark.parametrize("members", TEAMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_are_the_reference_s(maths_host: ModuleType, case: tuple[int, ...], members: int) -> None:
    actual = maths_host.sample_rows(IDS.numpy(), 2, case[:6], case[6], -11, 2, members, ALL_BITS)
    check(actual, expected_plan(case, 2, -11, 2))


@pytest.mark.parametrize("seed", [0, (1 << 63) - 1, -(1 << 63)])
@pytest.mark.parametrize("epoch", [0, ALL_BITS])
def test_all_bits_of_seed_and_epoch_count(maths_host: ModuleType, seed: int, epoch: int) -> None:
    case = CASES["image"]
    actual = maths_host.sample_rows(IDS.numpy(), 3, case[:6], case[6], seed, epoch, 0, ALL_BITS)
    check(actual, expected_plan(case, 3, seed, epoch))


@pytest.mark.parametrize("members", TEAMS)
@pytest.mark.parametrize("bits", [0, 0x80000000, 0xC0000000], ids=["one value", "two values", "four values"])
@pytest.mark.parametrize("name", ["image", "speech", "text", "text, tokens no multiple of four"])
def test_equal_priorities_go_to_the_smaller_token(
    maths_host: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, bits: int, members: int
) -> None:
    monkeypatch.setattr(reference, "row_draws", lambda *args, **more: row_draws(*args, **more) & bits)
    case = CASES[name]
    actual = maths_host.sample_rows(IDS.numpy(), 2, case[:6], case[6], 5, 1, members, bits)
    check(actual, expected_plan(case, 2, 5, 1))


def test_long_rows(maths_host: ModuleType) -> None:
    case = (1, 20001, 1500, 1, 5, 10000, False)
    actual = maths_host.sample_rows(IDS.numpy(), 1, case[:6], case[6], 1, 0, 0, ALL_BITS)
    check(actual, expected_plan(case, 1, 1, 0))


@pytest.mark.parametrize("purpose", [CENTRES, PRIORITIES])
def test_single_draws(maths_host: ModuleType, purpose: int) -> None:
    expected = row_draws(IDS, 3, 9, purpose, seed=7, epoch=4)
    for n in range(9):
        drawn = [maths_host.draw(int(IDS[n // 3]), n % 3, 7, 4, purpose, j) for j in range(9)]
        assert drawn == expected[n].tolist()


@pytest.mark.parametrize(("height", "width"), [(1, 7), (4, 5)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 11])
def test_runs_are_the_clipped_block(maths_host: ModuleType, height: int, width: int, length: int) -> None:
    side = length if height > 1 else 1
    for cell in range(height * width):
        top, left = cell // width - side // 2, cell % width - length // 2
        for down in range(side):
            start, end = maths_host.block_run(cell, down, height, width, side, length)
            y = top + down
            inside = [y * width + x for x in range(left, left + length) if 0 <= x < width and 0 <= y < height]
            assert list(range(start, end)) == inside
