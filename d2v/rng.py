"""The global random states of a run as tensors, so that a checkpoint holds them beside the weights.

Data, augmentation and masks do not use them (they are keyed by seed, epoch and sample); dropout, drop path,
layerdrop and the noise that pretraining's decoder gets do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def keyed(seed: int, device: torch.device) -> Iterator[None]:
    """What the block draws from torch, on the CPU and on `device`, depends on `seed` alone; the states
    afterwards are those before it."""
    gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpu):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


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
