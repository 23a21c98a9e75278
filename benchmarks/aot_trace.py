"""What an op does besides kernels of ours: a trace of PyTorch's own operators with the bytes they touch.

Counted per operator as if it read its inputs and wrote its outputs once. Views and allocations move nothing;
what an operator overwrites it does not read; copies by index touch as much as they pick or place. Temporaries
inside an operator are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OVERWRITES = {"copy_", "fill_", "zero_", "random_", "uniform_", "normal_", "bernoulli_", "_foreach_copy_",
               "_foreach_zero_"}  # fmt: skip
_PICKS = {"index_select", "gather", "index", "embedding", "take_along_dim"}
_PLACES = {"index_copy_", "scatter_", "index_put_", "_index_put_impl_", "index_add_", "scatter_add_"}
_ADDS = {"index_add_", "scatter_add_"}
_MOVES_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view"}


@dataclass(frozen=True)
class Call:
    """One operator of PyTorch that moves data."""

    name: str
    bytes: int
    allocated: int
    """of outputs that are new"""


class OpTrace(TorchDispatchMode):
    """Collects in `calls` what runs on a device in the block, forward and, within one thread, backward."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        returned = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        here = any(tensor.device.type == self.device for tensor in _tensors((args, kwargs, out)))
        if here and not is_view and name not in _MOVES_NOTHING:
            self.calls.append(_call(name, func._schema, args, kwargs, out))
        return out

    @property
    def bytes(self) -> int:
        """Read and written by all calls."""
        return sum(call.bytes for call in self.calls)

    @property
    def allocated(self) -> int:
        """Bytes of all new outputs, whether or not they were alive together."""
        return sum(call.allocated for call in self.calls)


def _call(name: str, schema: Any, args: Any, kwargs: Any, out: Any) -> Call:
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    written, read = [], []
    for argument in schema.arguments:
        tensors = _tensors(given.get(argument.name))
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            written += tensors
            if argument.is_out or name in _OVERWRITES or name in _PLACES:
                continue
        read += tensors
    new = [] if written else _tensors(out)
    allocated = sum(map(_bytes, new))
    if name in _PICKS:
        return Call(name, 2 * allocated + sum(map(_bytes, read[1:])), allocated)
    if name in _PLACES:
        # The source is read and written or added elsewhere; the index, the smaller of the two, is read.
        placed = max(map(_bytes, read), default=0) * (2 if name in _ADDS else 1)
        return Call(name, sum(map(_bytes, read)) + placed, allocated)
    return Call(name, sum(map(_bytes, read)) + sum(map(_bytes, written)) + allocated, allocated)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Without what `expand` repeats."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * tensor.element_size() if tensor.numel() else 0
