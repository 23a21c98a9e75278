"""How the launchers in this folder start kernels: one place for options, empty grids and recording.

Every kernel is started through `launch`, so that a recorder can see what would run: `benchmarks/aot.py` calls
the ops on meta tensors of the presets' shapes, takes the recorded launches and compiles them for GPUs that
are not there. A launch on meta tensors computes nothing.

Triton up to 3.7.0 pipelines a loop's copies into shared memory without telling the matrix unit of sm_90,
which reads there by another way (no fence.proxy.async between cp.async and wgmma; triton-lang/triton PR
9610). A product could read what is not there yet, so beside such a Triton `launch` starts kernels with
products without pipelining.
"""

import inspect
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from d2vkern._listeners import listening


@dataclass(frozen=True)
class Launch:
    """One kernel start: what Triton would be given."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    """positional, in the kernel's order: tensors, ints, floats or None"""
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool


MULTIPROCESSORS = 132
"""of an H100 or H200"""
MOST_STAGES_ON_AMD = 2
"""one buffer of a tile in 64 KB of LDS, and one in registers on its way there"""

PIPELINE = "D2VKERN_PIPELINE"
"""environment: 1 pipelines products even where `pipeline_hazard` has something to say"""
FENCED_FROM = (3, 7, 1)
"""the first Triton with fence.proxy.async in pipelined loops"""

_recorders: list[list[Launch]] = []


def record_launches() -> AbstractContextManager[list[Launch]]:
    """Yield a list that receives every launch of the block, on whatever device."""
    return listening(_recorders, [])


def busy(programs: int) -> float:
    """Share of the multiprocessors that have work when each runs one program at a time."""
    rounds = -(-programs // MULTIPROCESSORS)
    return programs / (rounds * MULTIPROCESSORS)


def recording() -> bool:
    """Whether somebody records launches."""
    return bool(_recorders)


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    fp_fusion: bool = True,
    **constexprs: Any,
) -> None:
    """Start `kernel` on a grid of up to three dimensions; a grid with a zero starts nothing.

    args: the kernel's runtime arguments in order. constexprs: its compile-time arguments by name.
    fp_fusion: whether a * b + c may become one rounding; pinned here because Triton's default has changed
        between versions. Kernels whose bits must equal eager's switch it off.
    """
    if 0 in grid:
        return
    for recorder in _recorders:
        recorder.append(Launch(kernel, tuple(grid), args, constexprs, num_warps, num_stages, fp_fusion))
    if any(isinstance(value, Tensor) and value.device.type == "meta" for value in args):
        return
    if torch.version.hip:
        num_stages = min(num_stages, MOST_STAGES_ON_AMD)
    device = _first_device(args)
    if (
        num_stages > 1
        and device is not None
        and device.type == "cuda"
        and not torch.version.hip
        and _hazard()
    ):
        num_stages = most_stages(kernel, num_stages, torch.cuda.get_device_capability(device))
    with _current(device):
        kernel[tuple(grid)](
            *args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion, **constexprs
        )


def pipeline_hazard(version: str) -> str:
    """What is wrong with pipelined products of that Triton on sm_90; empty: nothing."""
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if numbers is None or tuple(int(number or 0) for number in numbers.groups()) >= FENCED_FROM:
        return ""
    return (
        f"triton {version} leaves fence.proxy.async out of pipelined loops with matrix products on sm_90 "
        f"(triton-lang/triton PR 9610; {'.'.join(map(str, FENCED_FROM))} has it)"
    )


@cache
def _hazard() -> str:
    """The same of the Triton that is here, unless pipelining is asked for all the same."""
    import triton  # this module is imported where there is none, too

    return "" if os.environ.get(PIPELINE, "0") == "1" else pipeline_hazard(triton.__version__)


def most_stages(kernel: Any, num_stages: int, capability: tuple[int, int]) -> int:
    """Stages that a kernel may have on NVIDIA's GPUs of this compute capability."""
    return 1 if capability[0] == 9 and _hazard() and multiplies(kernel) else num_stages


@cache
def multiplies(kernel: Any) -> bool:
    """Whether a Triton kernel has matrix products, itself or in what it calls."""
    source = inspect.getsource(kernel.fn)
    named = (kernel.fn.__globals__.get(name) for name in set(re.findall(r"\b[a-z_]\w*\b", source)))
    return "tl.dot(" in source or any(
        multiplies(called)
        for called in named
        if called is not kernel and inspect.isfunction(getattr(called, "fn", None))
    )


def _first_device(args: tuple[Any, ...]) -> torch.device | None:
    """Of the first tensor."""
    return next((value.device for value in args if isinstance(value, Tensor)), None)


def _current(device: torch.device | None) -> AbstractContextManager[object]:
    """Makes a GPU current where it is not: Triton starts kernels there."""
    if device is not None and device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()
