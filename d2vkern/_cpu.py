"""What the processor is, as far as a choice between CPU backends depends on it."""

from functools import cache
from pathlib import Path

import torch


@cache
def vendor(path: Path = Path("/proc/cpuinfo")) -> str:
    """The x86 vendor as Linux names it ("GenuineIntel", "AuthenticAMD"), empty where it does not say."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            named = (line.partition(":") for line in lines if line.startswith("vendor_id"))
            return next((value.strip() for _, _, value in named), "")
    except OSError:
        return ""


def mkl_keeps_to_avx2() -> bool:
    """Whether PyTorch's fp32 products are MKL's and leave AVX-512 units idle: MKL asks for Intel's name."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and vendor() not in ("", "GenuineIntel")
