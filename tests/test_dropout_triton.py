"""kernels/_dropout.py: the bits of eager's keep-masks, whole counters and single elements, far out too."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from d2vkern.kernels._dropout import draw_seed, keep_at, keep_rows, keep_span, keep_tile, threshold  # noqa: E402
from d2vkern.reference._dropout import _counter_bits, keep_mask  # noqa: E402

SEED = 0x1234_5678_9ABC_DEF0


@triton.jit
def keep_kernel(
    tile_ptr, at_ptr, span_ptr, first_row, seed, dropout, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows first_row .. + 3, the first COLUMNS of them, by each function; the last as one span of a row."""
    row = tl.arange(0, 4).to(tl.int64) + first_row
    column = tl.arange(0, COLUMNS)
    seed = tl.full((), seed, tl.int64)
    at = tl.arange(0, 4)[:, None] * COLUMNS + column[None, :]
    tl.store(tile_ptr + at, keep_tile(row, 0, seed, dropout, WIDTH, COLUMNS))
    tl.store(at_ptr + at, keep_at(row[:, None] * WIDTH + column[None, :], seed, dropout))
    block = tl.full((), first_row, tl.int64) * (WIDTH // 8)
    tl.store(span_ptr + column, keep_span(block, seed, dropout, COLUMNS))


@pytest.mark.parametrize("seed", [0, -1, SEED, 2**32, -(2**63)], ids=hex)
@pytest.mark.parametrize("first_row", [0, 2**31 + 5], ids=["start", "counters beyond 2^32"])
def test_keep_functions_make_the_documented_bits(
    seed: int, first_row: int, triton_device: torch.device
) -> None:
    width, columns, first = 24, 16, first_row * 24
    # with this p an element's bits equal the threshold: it is just kept
    equal = int(_counter_bits(1, seed, first + 3, torch.device("cpu"))) / 65536
    for p in (1e-4, 0.37, 0.9999999, equal):
        tile, at = (torch.zeros(4, columns, dtype=torch.bool, device=triton_device) for _ in range(2))
        span = torch.zeros(columns, dtype=torch.bool, device=triton_device)
        keep_kernel[(1,)](tile, at, span, first_row, seed, threshold(p), WIDTH=width, COLUMNS=columns)
        whole = keep_mask((4, width), p, torch.device("cpu"), seed, first=first)[:, :columns]
        assert torch.equal(tile.cpu(), whole)
        assert torch.equal(at.cpu(), whole)
        assert torch.equal(span.cpu(), whole[0])
    assert whole[0, 3]


@triton.jit
def keep_rows_kernel(out_ptr, first_ptr, seed, dropout, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Sixteen rows of BLOCK elements, each from its own first one on."""
    first = tl.load(first_ptr + tl.arange(0, 16))
    at = tl.arange(0, 16)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at, keep_rows(first, tl.full((), seed, tl.int64), dropout, BLOCK, ALIGNED))


@pytest.mark.parametrize("aligned", [False, True], ids=["anywhere", "whole counters"])
@pytest.mark.parametrize("start", [0, 2**35 - 24], ids=["start", "a counter's upper word changes"])
def test_rows_may_start_within_a_counter(start: int, aligned: bool, triton_device: torch.device) -> None:
    first = start + torch.arange(16) * (8 if aligned else 5)
    assert set((first % 8).tolist()) == ({0} if aligned else set(range(8)))
    out = torch.zeros(16, 32, dtype=torch.bool, device=triton_device)
    keep_rows_kernel[(1,)](out, first.to(triton_device), SEED, threshold(0.4), BLOCK=32, ALIGNED=aligned)
    cpu = torch.device("cpu")
    expected = [keep_mask((32,), 0.4, cpu, SEED, first=value) for value in first.tolist()]
    assert torch.equal(out.cpu(), torch.stack(expected))


def test_seeds(triton_device: torch.device) -> None:
    given = torch.tensor(7, device=triton_device)
    assert draw_seed(given, triton_device) is given
    assert draw_seed(-3, triton_device).item() == -3
    torch.manual_seed(1)
    drawn = [draw_seed(None, triton_device).item() for _ in range(3)]
    torch.manual_seed(1)
    assert drawn == [draw_seed(None, triton_device).item() for _ in range(3)]
    assert len(set(drawn)) == 3
