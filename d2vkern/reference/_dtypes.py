"""The dtype in which sums are taken."""

import torch


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16-bit and fp32 values, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
