"""What the eager ops share."""

import math

import torch
from torch import Tensor

SLICE = 1 << 18
"""elements that a CPU's core works on at once: 1 MiB of fp32, half of its L2 cache"""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: fp32 for 16-bit and fp32 values, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def rows_of(x: Tensor) -> Tensor:
    """(..., D) as [rows, D], D = 0 too, where a -1 for the rows could be anything."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
