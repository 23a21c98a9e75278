"""How the launchers in this folder start kernels: one place for options, empty grids and recording.

Every kernel is started through `launch`, so that a recorder can see what would run: `benchmarks/aot.py` calls
the ops on meta tensors of the presets' shapes, takes the recorded launches and compiles them for GPUs that
are not there. A launch on meta tensors computes nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

_recorders: list[list[Launch]] = []


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Yield a list that receives every launch of the block, on whatever device."""
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.remove(launches)


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
    with _device_of(args):
        kernel[tuple(grid)](
            *args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion, **constexprs
        )


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[object]:
    """Makes the GPU of the first tensor current where it is not: Triton starts kernels there."""
    for value in args:
        if isinstance(value, Tensor):
            if value.is_cuda and value.device.index != torch.cuda.current_device():
                return torch.cuda.device(value.device)
            break
    return nullcontext()
