"""What a run asks of its process: random states, a polite stop, a device, an allocator that keeps memory.

The global random states are tensors, so that a checkpoint holds them beside the weights. Data,
augmentation and masks do not use them (they are keyed by seed, epoch and sample); dropout, drop path,
layerdrop and the noise that pretraining's decoder gets do.

The first signal asks a run to finish its step and save, a second Ctrl-C leaves at once: without that a
scheduler's SIGTERM would cost everything since the last checkpoint.

glibc hands large blocks back to the kernel when they are freed and maps them anew at the next allocation:
every activation of every step would be page-faulted in again, about as slow as the arithmetic on it. Keeping
freed memory in the process turns that into a reuse. Other C libraries are left alone.
"""

from __future__ import annotations

import ctypes
import math
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed torch (every device), numpy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def capture(device: torch.device) -> dict[str, Tensor]:
    """The states of torch (and of `device`, when it is a GPU), numpy and Python."""
    bits = np.random.get_state(legacy=False)
    version, words, next_gauss = random.getstate()
    assert version == 3, "Python's Mersenne Twister state, unchanged since 3.2"
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(
            [*bits["state"]["key"].tolist(), bits["state"]["pos"], bits["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor([bits["gauss"]], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if next_gauss is None else next_gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the states afterwards are those before it."""
    states = capture(device)
    try:
        yield
    finally:
        restore(states, device)


def restore(states: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `capture`. A state saved without a GPU leaves the GPU's generator as it is."""
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    *keys, place, has_gauss = states["numpy"].tolist()
    gauss = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    next_gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(next_gauss) else next_gauss))


def pick_device(name: str) -> torch.device:
    """`auto` is a CUDA GPU when there is one. ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"config: train.device must be auto, cpu or cuda[:N], got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"config: train.device is {name!r}, but torch {torch.__version__} sees no CUDA GPU")
    return device


STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C; what schedulers send before they kill (Slurm also sends SIGUSR1 when asked to)"""


class StopRequest:
    """Context manager; `name` is the signal that asked for a stop, None until then.

    Outside the main thread Python cannot install handlers; there the context does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


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
