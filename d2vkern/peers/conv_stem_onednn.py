"""conv_stem with oneDNN's fp32 products; the rest is eager's."""

from torch import Tensor

from d2vkern.peers._onednn import product
from d2vkern.reference.conv_stem import with_products


def _product_into(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    done = product(a, b, None)
    if add:
        out += done
    else:
        out.copy_(done)


conv_stem = with_products("onednn", _product_into)
