"""A watch over what passes between the host and a device, with torch's meta device in a GPU's place.

Meta tensors have no values, so what reads one fails by itself. A copy to them does not, nor does a tensor
made there of Python values, which on a GPU is a copy that waits; those are what is looked for here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
VALUES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""what makes a tensor of Python values"""
NO_META = ("aten::_fused_adamw_",)
"""in-place operators that PyTorch lacks for meta tensors"""


class _NoCopies(TorchDispatchMode):
    """Fails on every operator that touches tensors of both sides."""

    def __init__(self, inputs: bool) -> None:
        super().__init__()
        self.inputs = inputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        result = None if name in NO_META else func(*args, **kwargs)
        given = [t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found = [t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)]
        if len({*given, *found}) > 1:
            asynchronous = name == "aten::_to_copy" and kwargs.get("non_blocking") and given == ["cpu"]
            if not (self.inputs and asynchronous):
                raise AssertionError(f"{func} copies from {given} to {found}")
        return result


class _NoValues(TorchFunctionMode):
    """Fails on every tensor of the device that is made of Python values, to index with too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list) for place in places):
                raise AssertionError(f"the index {args[1]} is copied to the device")
        if func in VALUES and result.device == META:
            values = args[1] if func is Tensor.new_tensor else args[0]
            if not isinstance(values, Tensor):
                raise AssertionError(f"{func.__name__} copies {values} to the device")
        return result


@contextmanager
def no_transfers(*, inputs: bool = False) -> Iterator[None]:
    """AssertionError for whatever is copied to meta tensors or from them.

    inputs: let asynchronous copies to the device pass, as batches, labels and masks of the host are moved.
    """
    with _NoValues(), _NoCopies(inputs):
        yield
