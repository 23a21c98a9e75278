"""csrc/launch.cuh on a host: every grid covers its work once, within the limits of a GPU."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

MOST_X, MOST_YZ, SHARED = 2**31 - 1, 65535, 48 << 10


def within_limits(grid: object) -> bool:
    sizes = tuple(getattr(grid, name) for name in ("x", "y", "z", "threads", "shared"))
    x, y, z, threads, shared = sizes
    assert threads % 32 == 0 and 32 <= threads <= 1024 and 0 <= shared <= SHARED
    return 0 <= x <= MOST_X and 0 <= y <= MOST_YZ and 0 <= z <= MOST_YZ


# rows, places in each
ROWS = [
    (1, 1), (3, 8), (3, 9), (1024, 41), (65534, 1), (65535, 1), (65536, 1), (65537, 3), (131071, 2),
    (2**31 - 1, 1), (7, 2**31 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "length"), ROWS)
def test_rows_grid_reaches_every_place_once(maths_host: ModuleType, rows: int, length: int) -> None:
    grid = maths_host.rows_grid(rows, length)
    warps = grid.threads // 32
    assert within_limits(grid) and grid.possible() and not grid.empty()
    assert (grid.x - 1) * warps < length <= grid.x * warps
    assert grid.y * grid.z >= rows > grid.y * (grid.z - 1)
    z, y = np.divmod(np.array([0, 1, rows // 2, rows - 1]).clip(0, rows - 1), grid.y)
    found = [maths_host.row_of(int(b), int(a), grid.y) for a, b in zip(z, y, strict=True)]
    assert found == [0, min(1, rows - 1), rows // 2, rows - 1]
    assert maths_host.row_of(grid.y - 1, grid.z - 1, grid.y) == grid.y * grid.z - 1


def test_rows_of_a_small_grid_are_all_different(maths_host: ModuleType) -> None:
    grid = maths_host.rows_grid(200_000, 1)
    blocks = {maths_host.row_of(y, z, grid.y) for z in range(grid.z) for y in range(0, grid.y, 97)}
    assert len(blocks) == grid.z * len(range(0, grid.y, 97)) and max(blocks) < grid.y * grid.z


EMPTY: dict[str, Callable[[ModuleType], object]] = {
    "no tensors": lambda host: host.table_grid(0),
    "no samples": lambda host: host.masks_grid(0, 196),
    "no rows": lambda host: host.rows_grid(0, 5),
    "no places": lambda host: host.rows_grid(5, 0),
    "nothing to sum": lambda host: host.sums_grid(0),
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_nothing_to_do_is_an_empty_grid(maths_host: ModuleType, make: Callable[[ModuleType], object]) -> None:
    grid = make(maths_host)
    assert grid.empty() and within_limits(grid)  # type: ignore[attr-defined]


@pytest.mark.parametrize("programs", [1, 10_000, 2**31 - 1])
def test_table_grid_is_a_block_per_chunk(maths_host: ModuleType, programs: int) -> None:
    grid = maths_host.table_grid(programs)
    assert within_limits(grid) and (grid.x, grid.y, grid.z, grid.shared) == (programs, 1, 1, 0)
    assert grid.threads == 256


@pytest.mark.parametrize(
    ("grid", "what"),
    [("table_grid", (2**31,)), ("rows_grid", (65535 * 65535 + 1, 1)), ("masks_grid", (2**31, 9))],
)
def test_too_much_for_a_grid_is_known(maths_host: ModuleType, grid: str, what: tuple[int, ...]) -> None:
    made = getattr(maths_host, grid)(*what)
    assert not made.possible() and not made.empty()


@pytest.mark.parametrize(
    ("tokens", "threads", "shared"),
    [(1, 32, 20), (196, 32, 980), (256, 32, 1280), (257, 64, 1300), (1500, 256, 7500), (8189, 512, 40960),
     (8192, 512, 40960), (8193, 512, 0), (1 << 19, 512, 0)],
)  # fmt: skip
def test_masks_grid(maths_host: ModuleType, tokens: int, threads: int, shared: int) -> None:
    grid = maths_host.masks_grid(77, tokens)
    assert within_limits(grid) and (grid.x, grid.y, grid.z) == (77, 1, 1)
    assert (grid.threads, grid.shared) == (threads, shared)
    # Both counts of a round of the last pass share 32 bits.
    assert 4 * grid.threads < 1 << 16


@pytest.mark.parametrize("columns", [1, 4, 511, 512, 513, 197 * 768, 2**31 + 8])
def test_sums_grid_covers_every_column(maths_host: ModuleType, columns: int) -> None:
    grid = maths_host.sums_grid(columns)
    assert within_limits(grid) and 4 * grid.threads * (grid.x - 1) < columns <= 4 * grid.threads * grid.x


# samples, tokens, extras, needs (x, extra, positions, per_mask) -> first, summed, visited, samples per sum
BACKWARD = {
    "x alone": ((64, 196, 1), (True, False, False, False), (1, 0, 196, 1)),
    "x and extra": ((64, 196, 1), (True, True, False, False), (0, 1, 197, 1)),
    "everything": ((64, 196, 1), (True, True, True, True), (0, 197, 197, 4)),
    "positions alone": ((64, 196, 2), (False, False, True, False), (2, 196, 196, 4)),
    "extra alone": ((64, 196, 2), (False, True, False, False), (0, 2, 2, 1)),
    "nothing": ((64, 196, 2), (False, False, False, False), (2, 0, 0, 1)),
    "more samples than sums": ((2000, 10, 1), (True, True, False, False), (0, 1, 11, 8)),
    "no samples": ((0, 10, 1), (True, True, True, True), (0, 11, 11, 4)),
}


@pytest.mark.parametrize("case", BACKWARD.values(), ids=BACKWARD)
def test_rows_of_a_backward_pass(
    maths_host: ModuleType, case: tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...]]
) -> None:
    sizes, needs, expected = case
    rows = maths_host.backward_rows(*sizes, *needs)
    assert (rows.first, rows.summed, rows.visited, rows.group) == expected
    assert rows.groups == -(-sizes[0] // rows.group) <= 256


def _table(numels: list[int], chunk: int) -> tuple[np.ndarray, int]:
    """As kernels/_chunks.py lays it out, of tensors that need not exist."""
    chunks = [-(-numel // chunk) for numel in numels]
    programs = sum(chunks)
    words = [(programs + row * 4) << 32 | number for row, many in enumerate(chunks) for number in range(many)]
    records = [value for row, numel in enumerate(numels) for value in (numel, 0, 1, 4096 * row)]
    return np.array(words + records, np.int64), programs


TENSORS = {
    "10,000 tensors": [1 + i % 9000 for i in range(10_000)],
    "one of more than 2^31 elements": [5, 2**31 + 13, 7],
    "one of more than 2^32 elements": [2**32 + 1],
}


@pytest.mark.parametrize("numels", TENSORS.values(), ids=TENSORS)
def test_tables_of_many_and_of_large_tensors(maths_host: ModuleType, numels: list[int]) -> None:
    chunk = 8192
    table, programs = _table(numels, chunk)
    grid = maths_host.table_grid(programs)
    assert grid.x == programs and grid.possible()
    ends = np.zeros(len(numels), np.int64)
    for record, first, in_fours, count, _, address in maths_host.find_chunks(table, programs, chunk, 1):
        row = address // 4096
        assert record == programs + 4 * row and first == ends[row] and in_fours == count - count % 4
        ends[row] += count
    assert ends.tolist() == numels
