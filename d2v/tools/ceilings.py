"""This machine's own ceilings, measured: what bandwidths and FLOP rates are held against.

In the same process and run as what they are compared with, for a machine shared with others is not the same
from one minute to the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch

# Beyond every last-level cache in use; quick ones serve tests and dry runs, whose numbers mean nothing.
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_MATMUL = {"cpu": (2048, 768, 3072), "cuda": (8192, 8192, 8192)}
_QUICK_COPY_BYTES, _QUICK_MATMUL = 8 << 20, (256, 256, 256)


def rates(device: torch.device, dtypes: Iterable[torch.dtype], *, quick: bool = False) -> dict[str, float]:
    """Measured ceilings: "copy" in bytes/s (read plus written), FLOP/s of a matrix product by dtype."""
    size = _QUICK_COPY_BYTES if quick else _COPY_BYTES[device.type]
    shape = _QUICK_MATMUL if quick else _MATMUL[device.type]
    return {"copy": copy_rate(device, size)} | {
        str(dtype): matmul_rate(device, dtype, shape) for dtype in dtypes
    }


def copy_rate(device: torch.device, size: int) -> float:
    """bytes/s, read plus written, of copying `size` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    """FLOP/s of a matrix product [m, k] x [k, n]."""
    m, k, n = shape
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    return 2 * m * k * n / median_seconds(lambda: torch.mm(a, b), device)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """Median of `repeats` calls after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
