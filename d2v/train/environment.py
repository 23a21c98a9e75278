"""What a run ran on: versions, processor, GPUs, commit and command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import d2vkern
from d2vkern._cpu import processor

from ..config.atomic import write_json


def write_environment(run_dir: str | Path) -> dict[str, Any]:
    """Write and return `env.json`: what this process runs on."""
    environment = {
        "d2vkern": d2vkern.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": processor().name or platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv,
    }
    write_json(Path(run_dir) / "env.json", environment, indent=1)
    return environment


def _commit() -> str | None:
    """Commit of the checkout this package runs from; None when installed, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root), "rev-parse", "--verify", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
