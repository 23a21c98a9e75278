"""Named ranges for profilers: the ops in the NVTX domain "d2vkern", a trainer's phases in the domain "d2v".

An op's range is called "<op>/<fwd|bwd>/<backend>", such as "attention/bwd/triton"; its NVTX category is the
shape bucket and its payload the bytes that the op must move (`_costs.py`). torch.profiler shows every range
as "<domain>/<name>".

Ranges are off unless somebody looks: a tool that reads NVTX is attached (Nsight sets NVTX_INJECTION64_PATH or
NSYS_*), torch.profiler runs, or `D2VKERN_NVTX=1`; `D2VKERN_NVTX=0` keeps them off. Off, an op pays two flag
checks and a call.

Code that torch.compile traces has no ranges: Dynamo cannot trace NVTX calls (PyTorch issue 149552), and
inductor drops the record_function calls that Dynamo can keep, for it fuses across the ops they would name.
Ranges around a compiled call stay, and so do those in the bodies of registered ops, which are not traced.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import nvtx
import torch

from d2vkern._costs import Cost
from d2vkern._listeners import listening

Function = TypeVar("Function", bound=Callable[..., Any])

ENVIRONMENT = "D2VKERN_NVTX"
OPS, PHASES = "d2vkern", "d2v"
_COLORS = {OPS: "green", PHASES: "blue"}


@dataclass
class Tally:
    """What the calls under one name had to do, by formula."""

    calls: int = 0
    bytes: int = 0
    flops: int = 0

    def add(self, moved: int, flops: int) -> None:
        """Count one more call."""
        self.calls += 1
        self.bytes += moved
        self.flops += flops


def requested(environment: Mapping[str, str]) -> bool | None:
    """Whether ranges are always on (True), always off (False), or follow torch.profiler (None).

    Raises ValueError for a D2VKERN_NVTX that is neither 0 nor 1.
    """
    value = environment.get(ENVIRONMENT, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"environment {ENVIRONMENT}: must be 0 or 1, got {value!r}")
    if value:
        return value == "1"
    attached = any(key == "NVTX_INJECTION64_PATH" or key.startswith("NSYS_") for key in environment)
    return True if attached else None


_requested = requested(os.environ)
_profiler_runs = torch.autograd._profiler_enabled
_tallies: list[dict[str, Tally]] = []


def ranges_are_on() -> bool:
    """Whether a range opened now would be seen."""
    return _profiler_runs() if _requested is None else _requested


@contextmanager
def force_ranges(on: bool | None) -> Iterator[None]:
    """Ranges on or off in the block (None: as torch.profiler runs), whatever the environment says."""
    global _requested
    outer, _requested = _requested, on
    try:
        yield
    finally:
        _requested = outer


def tally_costs() -> AbstractContextManager[dict[str, Tally]]:
    """Yield a dict that receives calls, bytes and FLOPs under each op range's name while ranges are on."""
    return listening(_tallies, {})


def op_range(name: str, cost: Callable[..., Cost] | None = None) -> Callable[[Function], Function]:
    """Decorator: calls of the function are the range `name`, "<op>/<fwd|bwd>/<backend>".

    cost: takes the arguments of the function; for the forward of an autograd.Function without ctx, but with
        grad=ctx.needs_input_grad. Its backward needs none: what the forward found waits for it on ctx. A
        backward that is registered as an op of its own gives what `Cost.of_backward` returns.
    """
    backward = name.split("/")[1] == "bwd"

    def decorate(function: Function) -> Function:
        @functools.wraps(function, updated=())
        def ranged(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not ranges_are_on():
                return function(*args, **kwargs)
            work = Cost("")
            if backward and cost is None:
                forward = getattr(args[0], "range_cost", work)
                work = Cost(forward.bucket, *forward.backward)
            elif cost is not None and args and hasattr(args[0], "needs_input_grad"):
                work = args[0].range_cost = cost(*args[1:], grad=args[0].needs_input_grad)
            elif cost is not None:
                work = cost(*args, **kwargs)
            for tallies in _tallies:
                tallies.setdefault(name, Tally()).add(work.bytes, work.flops)
            with _Range(OPS, name, work):
                return function(*args, **kwargs)

        return ranged  # type: ignore[return-value]

    return decorate


def phase(name: str) -> AbstractContextManager[object]:
    """A context manager that marks its block as the phase `name`, such as "teacher" or "student/block07"."""
    if torch.compiler.is_compiling() or not ranges_are_on():
        return nullcontext()
    return _Range(PHASES, name)


class _Range:
    """An open range: in NVTX, and in torch.profiler when that runs."""

    __slots__ = ("_attributes", "_domain", "_record")

    def __init__(self, domain: str, name: str, cost: Cost | None = None) -> None:
        self._domain = nvtx.get_domain(domain)
        category = self._domain.get_category_id(cost.bucket) if cost is not None and cost.bucket else None
        self._attributes = self._domain.get_event_attributes(
            message=name,
            color=_COLORS[domain],
            category=category,
            payload=None if cost is None else cost.bytes,
        )
        self._record: AbstractContextManager[object] = nullcontext()
        if _profiler_runs():
            self._record = torch.autograd.profiler.record_function(f"{domain}/{name}")

    def __enter__(self) -> None:
        self._domain.push_range(self._attributes)
        self._record.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._record.__exit__(*error)
        self._domain.pop_range()
