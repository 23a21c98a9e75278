"""Roofline on paper: the bytes that an op's kernels move as written, beside its floor and what eager moves.

Kernels: every tensor argument counts once where the compiled kernel loads from it and once where it stores to
it, except where aot_budgets.py declares that less or more is touched; rows that several programs read count
once, because they come from L2 after the first. PyTorch's own operators around the kernels are traced and
added. Eager: the same case at one sample on this CPU, operator by operator, scaled to the batch; what the
allocator handed out meanwhile is counted by torch.profiler.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.aot_budgets import ISSUED, PASSES, TOUCHED
from benchmarks.aot_read import Resources
from benchmarks.aot_record import DTYPES, Record
from benchmarks.aot_trace import OpTrace
from benchmarks.cases import Inputs, Settings, backward, gradients_like, named, require_grad
from d2vkern.testing import allocations

H200_COPY = 4.3e12
"""bytes/s, read plus written, of a PyTorch copy of 8.6 GB from device to device on an H200 (2.0 ms)"""
H200_PRODUCTS = {"bfloat16": 790e12, "float32": 67e12}
"""FLOP/s of matrix products: measured on an H200 in bf16; in fp32 without TF32 what NVIDIA states"""
GOAL = 1.1
"""bytes moved over the floor's"""
PLAN_GOAL = 1.15
"""bytes moved over those of the passes that an op's plan is made of"""
LAUNCHES = {"forward": 1, "backward": 2}
"""kernels of one call, at most"""
MOST_VALUES = 1 << 22
"""of one list of tensors that an eager run works on; the rest is left out and scaled for"""


@dataclass(frozen=True)
class Paper:
    """One direction of one case; bytes, and numbers of launches or operators."""

    stem: str
    op: str
    case: str
    preset: str
    shape: str
    dtype: str
    direction: str
    floor: int
    """by d2vkern/_costs.py"""
    flops: int
    """of matrix products and convolutions, by d2vkern/_costs.py"""
    moved: int
    """by kernels and PyTorch's operators"""
    calls: int
    """of the implementation: one per layer for targets"""
    kernels: int
    library: int
    """of PyTorch's operators, matrix products included"""
    library_names: tuple[str, ...]
    products: bool
    """matrix products are among them: the op is not bound by its bytes"""
    issued: tuple[tuple[str, float, float], ...] = ()
    """(kernel, useful FLOPs, FLOPs with padding) of each launch with matrix products"""
    plan: int = 0
    """bytes of the passes its kernels are made for (PASSES of aot_budgets.py)"""
    undeclared: tuple[str, ...] = ()
    """accesses of which nobody knows how much they move"""
    eager_moved: int | None = None
    eager_allocated: int | None = None
    eager_operators: int | None = None

    @property
    def floor_us(self) -> float:
        """The longer of the bytes at an H200's measured copy bandwidth and the FLOPs at its matmul rate."""
        return max(self.floor / H200_COPY, self.flops / H200_PRODUCTS[self.dtype]) * 1e6

    @property
    def bound_by_bytes(self) -> bool:
        """Whether bytes, and not FLOPs or the products of a library, take the time."""
        return not self.products and self.floor / H200_COPY >= self.flops / H200_PRODUCTS[self.dtype]

    @property
    def ratio(self) -> float | None:
        """Bytes moved over bytes at the floor; None where the floor is nothing."""
        return self.moved / self.floor if self.floor else None

    def as_row(self) -> dict[str, Any]:
        return asdict(self) | {"floor_us": self.floor_us, "ratio": self.ratio}


def on_paper(record: Record, built: Callable[[Any], Resources | str], eager: bool = True) -> Paper:
    """The row of a record. built: what a launch compiles to."""
    case = record.case
    moved = record.library.bytes
    undeclared, issued, plan = [], [], 0
    for launch in record.launches:
        found, name = built(launch), launch.kernel.fn.__name__
        given = record.arguments(launch)
        if name in ISSUED:
            issued.append((name, *ISSUED[name](given)))
        plan += sum(_nbytes(given[argument]) for argument in PASSES.get(name, ()))
        if isinstance(found, Resources):
            by_access = touched(name, found, given)
            moved += sum(size for size in by_access.values() if size is not None)
            undeclared += [f"{name}: {access}" for access, size in by_access.items() if size is None]
    products = any(call.name in ("mm", "addmm", "bmm") for call in record.library.calls)
    paper = Paper(
        stem=record.stem,
        op=case.op,
        case=case.name,
        preset=case.preset,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        direction=record.direction,
        floor=record.floor,
        flops=record.flops,
        moved=moved,
        calls=record.calls,
        kernels=len(record.launches),
        library=len(record.library.calls),
        library_names=tuple(call.name for call in record.library.calls),
        products=products or bool(issued),
        issued=tuple(issued),
        plan=plan,
        undeclared=tuple(undeclared),
    )
    if not eager:
        return paper
    counted = eager_counts(record.stem, case.preset, case.name, case.dtype)[record.direction]
    return replace(paper, **counted)


def touched(kernel: str, found: Resources, given: Mapping[str, Any]) -> dict[str, int | None]:
    """Bytes that one launch moves by each access, such as "load x_ptr"; None: no tensor, and not declared."""
    declared = TOUCHED.get(kernel, {})
    moved: dict[str, int | None] = {}
    for access in found.traffic:
        for name in access.split(" ", 1)[1].split("|"):
            key = f"{access.split(' ', 1)[0]} {name}"
            value = given.get(name)
            if key in declared:
                moved[key] = _declared(declared[key], given)
            elif isinstance(value, Tensor):
                moved[key] = value.numel() * value.element_size()
            else:
                moved[key] = None
    return moved


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _declared(function: Callable[[Mapping[str, Any]], float], given: Mapping[str, Any]) -> int | None:
    """None when it asks for an argument that the kernel no longer has."""
    try:
        return int(function(given))
    except KeyError:
        return None


@cache
def eager_counts(stem: str, preset: str, name: str, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Direction -> Paper's eager fields, of one sample on this CPU times the samples of the GPU batch."""
    bench = importlib.import_module(f"benchmarks.bench_{stem}")
    small, large = (
        # A case of fp32 weights with copies in low precision is one of that precision.
        next(c for asked in DTYPES.values() for c in bench.cases(preset, size, asked)
             if (c.name, c.dtype) == (name, dtype))
        for size in ("cpu", "gpu")
    )  # fmt: skip
    scale = large.forward.bytes / small.forward.bytes
    if scale == 1.0:  # lists of weights, whatever the batch
        inputs, share = _some_of(small.make(torch.device("meta")))
        scale /= share
    else:
        inputs = require_grad(small, small.make(torch.device("cpu")))
    outputs: dict[str, Tensor] = {}

    def forward() -> None:
        outputs.update(named(small.call(inputs, "eager")))

    if not small.leaves:
        forward()  # optimizers make their state in the first call
    found = {"forward": _count(forward, scale)}
    if small.leaves:
        gradients = gradients_like(outputs, Settings(device=torch.device("cpu")), small.dtype)
        found["backward"] = _count(lambda: backward(small, inputs, outputs, gradients), scale)
    return found


def _count(run: Callable[[], object], scale: float) -> dict[str, int]:
    def traced() -> OpTrace:
        with OpTrace("cpu") as trace:
            run()
        return trace

    trace, changes = allocations(traced)
    return {
        "eager_moved": int(trace.bytes * scale),
        "eager_allocated": int(sum(change for change in changes if change > 0) * scale),
        "eager_operators": len(trace.calls),
    }


def _some_of(inputs: Inputs) -> tuple[Inputs, float]:
    """Lists of meta tensors cut to MOST_VALUES and made real; the share of the values that is left."""
    sizes = [tensor.numel() for tensor in max(inputs.values(), key=len)]
    taken, values = [], 0
    for index in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if not taken or values + sizes[index] <= MOST_VALUES:
            taken.append(index)
            values += sizes[index]
    real = {
        name: [torch.randn(tensors[i].shape).to(tensors[i].dtype) for i in sorted(taken)]
        for name, tensors in inputs.items()
    }
    return real, values / sum(sizes)
