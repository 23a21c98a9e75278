"""What a training run tells the C library about memory on a CPU.

glibc hands large blocks back to the kernel when they are freed and maps them anew at the next allocation:
every activation of every step would be page-faulted in again, about as slow as the arithmetic on it. Keeping
freed memory in the process turns that into a reuse. Other C libraries are left alone.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""glibc's own limit (DEFAULT_MMAP_THRESHOLD_MAX); larger blocks are mapped all the same"""


def tune_allocator() -> bool:
    """Keep freed memory in the process; True where the C library understood."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    )
