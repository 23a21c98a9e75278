"""What the processor is, as far as a choice between CPU backends depends on it."""

from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def vendor(path: Path = CPUINFO) -> str:
    """The x86 vendor as Linux names it ("GenuineIntel", "AuthenticAMD"), empty where it does not say."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    named = (line.partition(":") for line in lines if line.startswith("vendor_id"))
    return next((value.strip() for _, _, value in named), "")


def mkl_keeps_to_avx2() -> bool:
    """Whether PyTorch's fp32 products are MKL's and leave AVX-512 units idle: MKL asks for Intel's name."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and vendor() not in ("", "GenuineIntel")
