"""What the tests of the compiled extension share."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from d2vkern import _native

if _native.problem():
    pytest.skip(_native.problem(), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = range(torch.ops.d2vkern_native.cpu_level(-1) + 1)
"""instruction sets that this processor has: 0 the baseline, 1 AVX2, 2 AVX-512"""


@contextmanager
def cpu_level(level: int) -> Iterator[None]:
    """The extension on a lower instruction set in the block."""
    assert torch.ops.d2vkern_native.cpu_level(level) == level
    try:
        yield
    finally:
        torch.ops.d2vkern_native.cpu_level(-1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on that many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
