"""Whether tensors that an op writes share memory with each other, or with what it reads.

Backends walk lists of tensors in different orders, some of them in parallel: the result would depend on it.
"""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

Role = tuple[str, Sequence[Tensor | None]]
_bytes_of = operator.attrgetter("nbytes")
Layout = tuple[tuple[int, ...], tuple[int, ...], int]
"""shape, strides and bytes of an element"""


class _Place(NamedTuple):
    """A tensor and where it stands."""

    name: str
    row: int
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.name}[{self.row}]"


def check_memory(
    op: str, written: Sequence[Role], read: Sequence[Role] = (), *, in_step: bool = False
) -> None:
    """Raise ValueError where a tensor that is written overlaps with another, or with itself.

    written, read: lists of one length and their names.
    in_step: the i-th tensors of all lists go element by element, so that they may be the same.
    """
    if torch.compiler.is_compiling():
        return
    tensors = [x for _, row_tensors in (*written, *read) for x in row_tensors if x is not None]
    if not tensors or not have_addresses(tensors):
        return
    whole = all(map(Tensor.is_contiguous, tensors))
    starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    sizes = map(_bytes_of, tensors) if whole else map(_extent, tensors)
    # what has no elements has address 0, and meets nothing
    ends = starts + np.fromiter(sizes, np.int64, len(tensors)) * (starts != 0)
    order = np.argsort(starts)
    reached = np.maximum.accumulate(ends[order])
    # hundreds of tensors a step are asked: what follows is for those that do something odd
    meeting = np.nonzero(starts[order][1:] < reached[:-1])[0] + 1
    if whole and not len(meeting):
        return
    names = [name for name, _ in written]
    places = [
        _Place(name, row, tensor)
        for name, row_tensors in (*written, *read)
        for row, tensor in enumerate(row_tensors)
        if tensor is not None
    ]
    for place in places:
        if place.name in names and torch._debug_has_internal_overlap(place.tensor) == 1:
            raise ValueError(f"{op}: {place} must have memory for each element, got an expanded tensor")
    for k in meeting:
        for j in order[:k][ends[order[:k]] > starts[order[k]]]:
            first, second = (places[i] for i in sorted((order[k], j)))
            if _may_not_meet(first, second, names, in_step) and _share(first.tensor, second.tensor):
                raise ValueError(f"{op}: {first} must not overlap in memory, got one with {second}")


def _may_not_meet(a: _Place, b: _Place, written: list[str], in_step: bool) -> bool:
    x, y = a.tensor, b.tensor
    if (a.name not in written and b.name not in written) or x.device != y.device:
        return False
    one = in_step and a.row == b.row and identity(x) == identity(y)
    return x.numel() > 0 and y.numel() > 0 and not one


def have_addresses(tensors: Sequence[Tensor]) -> bool:
    """Whether they lie somewhere: not on the meta device, nor are fakes or other subclasses."""
    return not tensors[0].is_meta and {*map(type, tensors)} <= {Tensor, Parameter}


def identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for the same elements in the same order."""
    return tensor.data_ptr(), tensor.dtype, *_layout(tensor)


def _layout(tensor: Tensor) -> Layout:
    return tuple(tensor.shape), tensor.stride(), tensor.element_size()


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    return _span(*_layout(tensor))


def _span(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> int:
    return (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))) * item


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose extents overlap have a byte in common: views may interleave."""
    if all(_extent(x) == x.numel() * x.element_size() for x in (a, b)):
        return True
    if a.data_ptr() > b.data_ptr():
        a, b = b, a
    return _meet(_layout(a), _layout(b), b.data_ptr() - a.data_ptr())


@lru_cache(maxsize=256)
def _meet(first: Layout, second: Layout, apart: int) -> bool:
    """Whether two layouts, the second `apart` bytes further on, have a byte in common."""
    unit = math.gcd(apart, *(size * item for _, strides, item in (first, second) for size in (1, *strides)))
    taken = torch.zeros(max(_span(*first), apart + _span(*second)) // unit, dtype=torch.bool)
    _bytes(taken, first, 0, unit).fill_(True)
    return bool(_bytes(taken, second, apart // unit, unit).any())


def _bytes(memory: Tensor, layout: Layout, offset: int, unit: int) -> Tensor:
    """The view of memory, in units of bytes, that a layout is."""
    shape, strides, item = layout
    steps = [stride * item // unit for stride in strides]
    return memory.as_strided((*shape, item // unit), (*steps, 1), offset)
