"""Registration of an op's implementation with torch.library, so that torch.compile sees one opaque call.

`define` + `impl` + `register_fake`, with the autograd.Function outside: half the host time per call of
`custom_op` + `register_autograd` (PyTorch issues 139500, 176592, 177109). Only backends whose code Dynamo
cannot trace are registered; eager stays traceable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2vkern import _native
from d2vkern._costs import Cost
from d2vkern._nvtx import op_range
from d2vkern.kernels._launch import recording

_LIBRARY = torch.library.Library("d2vkern", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `d2vkern::<schema>` and return the function that calls it (positional arguments only).

    schema: as torch.library takes it, with mutated arguments marked: "x_fwd(Tensor x, Tensor(a!)[] y) -> ()".
        Outputs must never alias inputs.
    run: does the work, on CUDA tensors and, in Triton's interpreter, on CPU tensors. NVTX ranges belong on
        it, since its body is not traced.
    fake: the same signature; returns empty outputs of the right shapes, dtypes and strides (`new_empty`).
    While launches are recorded `run` is called directly, so that meta tensors reach its launches too.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"d2vkern::{name}", fake, lib=_LIBRARY)
    registered = getattr(torch.ops.d2vkern, name).default

    def call(*args: Any) -> Any:
        return run(*args) if recording() else registered(*args)

    return call


@dataclass(frozen=True)
class Kernel:
    """A registered op that several backends compute: all of it but the work.

    schema: as `define` takes it; the extension has its own in csrc/ops.cpp.
    range: name of its profiler range without the backend, "<op>/<fwd|bwd>".
    outputs: the fake; what a backend's function returns, not yet written.
    cost: takes the op's arguments.
    """

    schema: str
    range: str
    outputs: Callable[..., Any]
    cost: Callable[..., Cost]

    def triton(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Register `run` as d2vkern's and return the function that calls it, see `define`."""
        return define(self.schema, op_range(f"{self.range}/triton", self.cost)(run), self.outputs)

    def native(self) -> Callable[..., Any]:
        """The extension's op of that name, for torch.compile too; ImportError without the extension."""
        registered = _native.op(self.schema.partition("(")[0], self.outputs)
        return op_range(f"{self.range}/native", self.cost)(registered)


def gradients_like(likes: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of the tensors, not yet written; empty where none is needed, as an op returns no None."""
    first = likes[0]
    assert first is not None
    return tuple(
        first.new_empty(0) if like is None or not need else like.new_empty(like.shape)
        for like, need in zip(likes, needs, strict=True)
    )


def needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are needed, None for the others."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
