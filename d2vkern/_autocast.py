"""torch.autocast's rule for our ops, by kind, as torch lists its own (aten/src/ATen/autocast_mode.h).

    products  matrix products, convolutions, attention: in autocast's dtype
    norms     in fp32, as torch's layer_norm; on a CPU, whose list has no norms, in the widest dtype given
    gathers   in the widest dtype given

fp64 stays fp64. Losses and targets need no rule: whatever they are given, they sum in fp32 and return it.
fp32 parameters stay as they are too. Ops take them as masters and cast them at each use, inside, so there is
no cast weight to keep until backward and nothing for torch's cache of them; their gradients are fp32.

The casts are autograd's: an input's gradient has its dtype. Public functions call one of these after the
shapes are checked and before the dtypes are.
"""

from typing import Any

import torch
from torch import Tensor

_NARROW = (torch.bfloat16, torch.float16)
_CAST = (torch.float32, *_NARROW)


def is_on(device: torch.device) -> bool:
    """Whether torch.autocast holds for tensors of this device; never for meta, which it does not know."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def for_product(x: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """x and the parameters of a product, as autocast has them."""
    if not is_on(x.device) or x.dtype not in _CAST:
        return (x, *parameters)
    dtype = torch.get_autocast_dtype(x.device.type)
    return (x.to(dtype), *_masters(dtype, parameters))


def for_norm(x: Tensor, update: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """What is added and normed, and the parameters, as autocast has them; a narrow update may stay so."""
    if not is_on(x.device):
        return (x, update, *parameters)
    dtype = torch.promote_types(x.dtype, update.dtype)
    if x.device.type != "cpu" and dtype in _NARROW:
        dtype = torch.float32
    if dtype != torch.float32:
        update = update.to(dtype)
    return (x.to(dtype), update, *_masters(dtype, parameters))


def for_gather(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Tensors that are added to one another, as autocast has them: torch's promotion."""
    if not is_on(x.device):
        return (x, *others)
    dtype = x.dtype
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return (x.to(dtype), *(None if other is None else other.to(dtype) for other in others))


def _masters(dtype: torch.dtype, parameters: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [p.to(dtype) if p is not None and p.dtype in _NARROW else p for p in parameters]
