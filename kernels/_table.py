"""Many tensors in one launch: their addresses in a table on the device, rebuilt only when one of them moves.

A row is a set of tensors that go together element by element (a parameter, its gradient, its moments, ...),
at most one in each column. A chunk is CHUNK consecutive elements of a row in memory order; a program does
one. The table is one int64 tensor on the device,

    words    [programs]            index of the row's record in the table << 32 | chunk's number in the row
    records  [rows, 3 + columns]   elements, kind, aligned, then the addresses (0: there is no such tensor)

so that a program finds its work in two dependent loads. Programs read 8 bytes and one record of some 80 each,
which stays in cache: 0.02% of what 8 Ki elements of the moving average are.

Dtypes. The kind of a row is the tuple of its tensors' codes (NONE, FP32, FP16, BF16). The kinds of a launch
are a constexpr: one kind, the usual case, compiles to straight code; with several each program takes one
uniform branch.

Alignment. Four neighbouring elements are one access: 16 bytes of fp32 and 8 of fp16 or bf16 (16 of those
would need an exchange between threads, since fp32 sits at 4 per thread). A row whose tensors all start at a
multiple of that is aligned: only its last numel % 4 elements go one by one. Of other rows all do.

Strides. The tensors of a row may share any dense layout. Those that do not follow the first one's (or, where
that one has gaps, a dense one in its order) are copied into it, and copied back if written: one more read and
write of each.

CUDA graphs. A table that exists before capture is kept for the graph. One that is made during capture,
because an address is new, becomes a node that copies it from pinned memory at every replay. Neither waits.
What is kept goes once the tensors that it writes have gone, without which no replay makes sense. Tensors in
a graph's own memory do not count, they may go while the memory stays: a table of such alone is kept for good.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

NONE, FP32, FP16, BF16 = range(4)
_CODES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
_HEADER = 3
_CACHED_TABLES = 16

_dtype_of = operator.attrgetter("dtype")


class Column(NamedTuple):
    """Tensors of one role, at most one per row."""

    name: str
    tensors: Sequence[Tensor]
    rows: Sequence[int] | None = None
    """the row of each tensor; None: one for every row"""
    written: bool = False


@dataclass(frozen=True)
class Table:
    """What a launch needs to know of its tensors."""

    data: Tensor
    """[programs + rows * (3 + columns)] int64, on the device"""
    programs: int
    kinds: tuple[tuple[int, ...], ...]
    staged: Tensor
    """`data` on the host, pinned for a GPU; the copy may still be on its way"""


tables: dict[tuple[object, ...], Table] = {}


class _Kept(NamedTuple):
    """What CUDA graphs read at every replay."""

    memory: Tensor
    written: list[StorageWeakRef]
    """of the tensors that the table writes, but for those in a graph's own memory"""

    def needed(self) -> bool:
        return not self.written or not all(storage.expired() for storage in self.written)


_captured: dict[int, _Kept] = {}
"""by the memory's address"""


@contextmanager
def table_of(op: str, columns: Sequence[Column], chunk: int, backend: str = "triton") -> Iterator[Table]:
    """The table of `columns` for chunks of `chunk` elements, inside a block that launches with it.

    backend: who asks, for the words of an error.
    columns: the first has a tensor in every row, whose shape all tensors of the row have. Afterwards the
        written ones count as changed in place.
    Raises ValueError, naming the tensor, for a dtype or device that a kernel cannot read, and for memory that
    stands in two rows of a written column.
    """
    followed, strays = _one_layout_per_row(columns)
    table = _lookup(op, followed, chunk, backend)
    yield table
    for tensor, dense in strays:
        tensor.copy_(dense)
    for column in columns:
        if column.written:
            torch.autograd.graph.increment_version(column.tensors)


def _lookup(op: str, columns: Sequence[Column], chunk: int, backend: str) -> Table:
    """The cached table, unless an address, a size or a dtype is another."""
    tensors = list(chain.from_iterable(column.tensors for column in columns))
    device = tensors[0].device
    numels = tuple(map(Tensor.numel, columns[0].tensors))
    addresses, dtypes = tuple(map(Tensor.data_ptr, tensors)), tuple(map(_dtype_of, tensors))
    rows = (len(column.tensors) if column.rows is None else tuple(column.rows) for column in columns)
    key = (chunk, device, *rows, numels, addresses, dtypes)
    capturing = _is_captured(device)
    table = tables.get(key)
    if table is None or capturing:
        _release()
    if table is not None and capturing:
        _keep(table.data, columns)
    elif table is None:
        _check(op, columns, device, backend)
        table = _build(columns, chunk, device, numels, np.array(addresses), dtypes)
        if capturing:
            # Nobody else may use it: it is filled at the first replay.
            _keep(table.staged, columns)
        else:
            tables[key] = table
            if len(tables) > _CACHED_TABLES:
                del tables[next(iter(tables))]
    if device.type == "cuda" and not capturing:
        # Callers on several streams are ordered by the tensors that they write, the allocator is not.
        table.data.record_stream(torch.cuda.current_stream(device))
    return table


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _keep(memory: Tensor, columns: Sequence[Column]) -> None:
    """For the graph that is being captured."""
    owned = _graphs_memory()
    written = chain.from_iterable(column.tensors for column in columns if column.written)
    outside = [x for x in written if not any(first <= x.data_ptr() < end for first, end in owned)]
    _captured[memory.data_ptr()] = _Kept(memory, [StorageWeakRef(x.untyped_storage()) for x in outside])


def _graphs_memory() -> list[tuple[int, int]]:
    """Address ranges that belong to CUDA graphs; all, where the allocator does not say."""
    if torch.cuda.get_allocator_backend() != "native":
        return [(0, 2**64)]
    return [
        (segment["address"], segment["address"] + segment["total_size"])
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    ]


def _release() -> None:
    """Let go of what no graph can need any more."""
    for address in [address for address, kept in _captured.items() if not kept.needed()]:
        del _captured[address]


def _build(
    columns: Sequence[Column],
    chunk: int,
    device: torch.device,
    numels: tuple[int, ...],
    addresses: np.ndarray,
    dtypes: tuple[torch.dtype, ...],
) -> Table:
    """addresses, dtypes: those of all columns' tensors, column after column."""
    rows, width = len(numels), _HEADER + len(columns)
    words = _words(numels, chunk, width)
    staged = torch.empty(len(words) + rows * width, dtype=torch.int64, pin_memory=device.type == "cuda")
    staged[: len(words)] = words
    records = staged[len(words) :].view(rows, width).numpy()
    records[:] = 0
    records[:, 0], records[:, 2] = numels, 1
    codes = np.array([_CODES[dtype] for dtype in dtypes])
    kind = np.zeros(rows, np.int64)
    start = 0
    for i, column in enumerate(columns):
        here = slice(start, start := start + len(column.tensors))
        at = slice(len(column.tensors)) if column.rows is None else list(column.rows)
        records[at, _HEADER + i] = addresses[here]
        kind[at] += codes[here] << 2 * i
        records[at, 2] &= addresses[here] % np.where(codes[here] == FP32, 16, 8) == 0
    kinds, records[:, 1] = np.unique(kind, return_inverse=True)
    return Table(
        staged.to(device, non_blocking=True),
        len(words),
        tuple(tuple(packed >> 2 * i & 3 for i in range(len(columns))) for packed in kinds.tolist()),
        staged,
    )


@lru_cache(maxsize=8)
def _words(numels: tuple[int, ...], chunk: int, width: int) -> Tensor:
    """[programs] int64: see the header of this file."""
    chunks = -(-np.asarray(numels, np.int64) // chunk)
    programs = int(chunks.sum())
    row = np.repeat(np.arange(len(chunks)), chunks)
    number = np.arange(programs) - np.repeat(chunks.cumsum() - chunks, chunks)
    return torch.from_numpy((programs + row * width) << 32 | number)


def _check(op: str, columns: Sequence[Column], device: torch.device, backend: str) -> None:
    dtypes, allowed = set(_CODES), "fp32, fp16 or bf16"
    if device.type == "cpu":
        dtypes, allowed = dtypes - {torch.bfloat16}, "fp32 or fp16 in Triton's interpreter"
    for column in columns:
        tensors = column.tensors
        odd = [i for i, x in enumerate(tensors) if x.device != device or x.dtype not in dtypes]
        if odd:
            tensor = tensors[odd[0]]
            name = f"{op}: {column.name}[{odd[0] if column.rows is None else column.rows[odd[0]]}]"
            if tensor.device != device:
                raise ValueError(f"{name} must be on {device} like the others, got {tensor.device}")
            raise ValueError(
                f"{name} must be {allowed} on backend {backend!r} (eager takes more), got {tensor.dtype}"
            )
        # Empty tensors have address 0.
        filled = [address for address in map(Tensor.data_ptr, tensors) if address] if column.written else []
        if len(set(filled)) != len(filled):
            raise ValueError(f"{op}: {column.name} must not hold the same memory twice")


def _one_layout_per_row(columns: Sequence[Column]) -> tuple[Sequence[Column], list[tuple[Tensor, Tensor]]]:
    """The columns with dense copies of the tensors that stray from their row's layout; of the written ones
    among those, (tensor, copy)."""
    if all(map(Tensor.is_contiguous, chain.from_iterable(column.tensors for column in columns))):
        return columns, []
    layouts = [
        x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
        for x in columns[0].tensors
    ]
    followed, strays = [], []
    for column in columns:
        tensors = list(column.tensors)
        for i, x in enumerate(tensors):
            layout = layouts[i if column.rows is None else column.rows[i]]
            if any(n > 1 and own != row for n, own, row in zip(x.shape, x.stride(), layout, strict=True)):
                tensors[i] = torch.empty_strided(x.shape, layout, dtype=x.dtype, device=x.device).copy_(x)
                if column.written:
                    strays.append((x, tensors[i]))
        followed.append(column._replace(tensors=tensors))
    return followed, strays
