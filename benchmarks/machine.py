"""What numbers are held against and where they come from: this machine's copy and matmul rates."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

_CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
# Beyond every last-level cache in use; small ones serve --smoke, whose numbers mean nothing.
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_MATMUL = {"cpu": (2048, 768, 3072), "cuda": (8192, 8192, 8192)}
_SMOKE_COPY_BYTES, _SMOKE_MATMUL = 8 << 20, (256, 256, 256)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the cores and memory (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in _CPU_CACHE.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 << 20)


def rates(device: torch.device, dtypes: list[torch.dtype], smoke: bool = False) -> dict[str, float]:
    """Measured ceilings: "copy" in bytes/s (read plus written), FLOP/s of a matmul under each dtype."""
    size = _SMOKE_COPY_BYTES if smoke else _COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    found = {"copy": 2 * size / _median_seconds(partial(torch.empty_like(source).copy_, source), device)}
    del source
    m, k, n = _SMOKE_MATMUL if smoke else _MATMUL[device.type]
    for dtype in dtypes:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        found[str(dtype)] = 2 * m * k * n / _median_seconds(partial(torch.mm, a, b), device)
    return found


def _median_seconds(call: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def provenance(device: torch.device) -> dict[str, Any]:
    """Hardware, driver, versions, commit, date, threads."""
    return {
        "device": device.type,
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _output("git", "rev-parse", "--short", "HEAD") or None,
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """First line a command prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
