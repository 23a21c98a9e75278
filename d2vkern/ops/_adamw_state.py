"""The state of AdamWEMA's parameters: what is known of step counts, and tensors as steps need them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from d2vkern._checks import check_shape
from d2vkern._shards import check_same_shards


@dataclass(slots=True)
class History:
    """What is known of a step count without reading it, which a capturable optimizer may not.

    Parameters that agree in all but `step` and `version` have the same count. Those change only when a
    gradient is missing or somebody changes the state, so that compiled steps need not be compiled anew.
    """

    step: Tensor
    """the count in the optimizer's state"""
    version: int
    """of its memory, as our last step left it"""
    first: float
    """the count when it was last looked at"""
    begun: int
    """which look that was: counts that were not seen together are not compared"""
    missed: int = 0
    """steps since then without a gradient; steps that found inf are skipped by all"""

    def stale(self) -> bool:
        """Whether somebody else has written to the count since."""
        return not torch.compiler.is_compiling() and self.step._version != self.version


def beside(p: Tensor, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a parameter's state in `dtype`, with its device and strides: itself where it is so."""
    check_shape("adamw_ema", f"the state's {name}", value, tuple(p.shape), like="its parameter")
    check_same_shards("adamw_ema", f"the state's {name}", value, "its parameter", p)
    if (value.dtype, value.device, value.stride()) == (dtype, p.device, p.stride()):
        return value
    return torch.empty_like(p, dtype=dtype).copy_(value)


def is_hidden(count: Tensor) -> bool:
    """Whether its value cannot be read now."""
    if torch.compiler.is_compiling() or count.is_meta:
        return True
    return count.is_cuda and torch.cuda.is_current_stream_capturing()
