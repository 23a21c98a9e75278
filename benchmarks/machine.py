"""Where numbers come from: this machine, its caches and versions. `d2v.tools.ceilings` measures its rates."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from d2vkern._cpu import processor
from d2vkern.info import pipeline

_CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the cores and memory (32 MiB where the system does not say)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in _CPU_CACHE.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=32 << 20)


def provenance(device: torch.device) -> dict[str, Any]:
    """Hardware, driver, versions, commit, date, threads."""
    return {
        "device": device.type,
        "cpu": processor().name or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "pipeline": pipeline(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _output("git", "rev-parse", "--short", "HEAD") or None,
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


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
