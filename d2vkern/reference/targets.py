"""Eager maths of the regression targets: a running sum of normalised teacher layers.

Norms that stay within a sample run in slices of whole samples that fit the processor's cache, so that on a
CPU a layer is read from memory once however many passes its norm takes; under torch.compile and on a GPU one
slice is the whole batch. fp32 throughout (fp64 for fp64 layers). Shape suffixes: B samples, T tokens, D
width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.reference._common import SLICE

EPS = 1e-5


@op_range("targets/fwd/eager", _costs.targets)
def accumulate(accumulator: Tensor | None, layer: Tensor, norm: str | None) -> Tensor:
    """Add one normalised layer [B,T,D] to the fp32 accumulator (in place; made when None) and return it."""
    if accumulator is None:
        dtype = torch.float64 if layer.dtype == torch.float64 else torch.float32
        accumulator = torch.zeros(layer.shape, dtype=dtype, device=layer.device)
    for total, x in _slices(norm, accumulator, layer):
        x = x.to(total.dtype)
        total.add_(x if norm is None else _NORMS[norm](x))
    return accumulator


@op_range("targets/fwd/eager", _costs.targets_finish)
def finish(accumulator: Tensor, layers: int, final: str | None) -> Tensor:
    """Turn the sum of `layers` layers into their normalised average, in place."""
    accumulator.div_(layers)
    if final is not None:
        for (total,) in _slices(final, accumulator):
            total.copy_(_NORMS[final](total))
    return accumulator


def _slices(norm: str | None, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    size = tensors[0].numel()
    if norm == "batch" or size == 0 or tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return [tensors]
    step = max(1, SLICE * tensors[0].shape[0] // size)
    return list(zip(*(tensor.split(step) for tensor in tensors), strict=True))


def _standardise(x_BTD: Tensor, dims: tuple[int, ...]) -> Tensor:
    """(x - mean) / sqrt(biased variance + eps) over `dims`, two passes: a large mean costs no digits."""
    centred = x_BTD - x_BTD.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    return centred.mul_((variance + EPS).rsqrt())


def _layer_norm(x_BTD: Tensor) -> Tensor:
    return F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=EPS)


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "instance": partial(_standardise, dims=(1,)),
    "batch": partial(_standardise, dims=(0, 1)),
    "layer": _layer_norm,
}
