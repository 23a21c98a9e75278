"""What the processor is, as far as a choice between CPU backends depends on it."""

from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch

_ZEN_5 = 26
"""family of the first AMD processors whose AVX-512 units are 512 bits wide"""


class Processor(NamedTuple):
    """A processor as Linux names it; empty and 0 where it does not say, as for other makes than x86."""

    vendor: str = ""
    """GenuineIntel, AuthenticAMD"""
    family: int = 0
    name: str = ""


@cache
def processor(path: Path = Path("/proc/cpuinfo")) -> Processor:
    """The first of the list, which is read no further: Linux makes it while it is read, core by core."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            named = [line.partition(":") for line in takewhile(str.strip, lines)]
    except OSError:
        return Processor()
    facts = {name.strip(): value.strip() for name, _, value in named}
    family = facts.get("cpu family", "")
    number = int(family) if family.isdigit() else 0
    return Processor(facts.get("vendor_id", ""), number, facts.get("model name", ""))


def mkl_leaves_units_idle() -> bool:
    """Whether PyTorch's fp32 products are MKL's and use half of AVX-512 units of full width.

    MKL keeps its AVX-512 kernels to Intel's processors. Before Zen 5, AMD's have AVX-512 on units of 256
    bits, and MKL's AVX2 kernels are level with oneDNN's.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    return processor().vendor == "AuthenticAMD" and processor().family >= _ZEN_5
