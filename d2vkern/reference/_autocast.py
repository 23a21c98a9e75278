"""Eager ops compute in the dtypes they are given: torch.autocast, which would cast some of their operators'
inputs and not others, is off inside of them, forward and backward, as it is inside registered ops. Its rule
is followed outside, by the public functions (d2vkern/_autocast.py)."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2vkern._autocast import is_on

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Decorator: autocast is off in the calls, for the device of their first tensor.

    In a backward pass that is the first tensor after ctx: the gradient of the output. torch.compile traces
    backward passes under whatever autocast surrounds the forward, so there their products are its own.
    """

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        device = next(value for value in args if isinstance(value, Tensor)).device
        if not is_on(device):
            return function(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return plain  # type: ignore[return-value]
