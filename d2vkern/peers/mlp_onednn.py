"""gelu_mlp and linear with oneDNN's fp32 products; the rest is eager's."""

from torch import Tensor

from d2vkern.peers._onednn import product
from d2vkern.reference._common import rows_of
from d2vkern.reference.mlp import with_products


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return product(rows_of(x), w.t(), b).view(*x.shape[:-1], w.shape[0])


def _product(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b, None)


gelu_mlp, linear = with_products("onednn", _linear, _product)
