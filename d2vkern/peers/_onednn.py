"""fp32 matrix products by oneDNN on a CPU, and where they are worth it.

PyTorch's fp32 products are MKL's, whose AVX-512 kernels are for Intel's processors: on others it keeps to
AVX2, and oneDNN, which goes by what the processor can do, is about twice as fast where AVX-512 units are
512 bits wide (AMD's from Zen 5 on; level on Zen 4). oneDNN sums the inner dimension in long chains, so at
3072 its rounding error is 2.3 times MKL's; in pieces of `PIECE` it is 1.6 times, for every length.
Transposed operands, as backward passes have them, are also faster in pieces.
"""

import torch
from torch import Tensor

from d2vkern._library import define

PIECE = 1024
SMALL = 1 << 22
"""multiply-adds below which PyTorch's product is faster: a call of oneDNN through PyTorch costs 15 us"""


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    if m * k * n < SMALL:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    if bias is None and m > 2 * n and a.t().is_contiguous() and b.is_contiguous():
        # Of two transposed operands oneDNN has to lay out the first anew: the narrow one is the cheaper.
        return _pieces(b.t(), a.t(), None).t().contiguous()
    return _pieces(a, b, bias)


def _pieces(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    out = _linear(a[:, :PIECE], b[:PIECE], bias)
    for start in range(PIECE, a.shape[1], PIECE):
        out += _linear(a[:, start : start + PIECE], b[start : start + PIECE], None)
    return out


def _linear(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).t(), bias, "none", [], "")
    return out


def _dense(x: Tensor) -> Tensor:
    """x where it or its transpose is contiguous, else a copy: oneDNN takes plain loops to rows with gaps."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


_registered = define(
    "onednn_product(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    _product,
    lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]),
)


def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b + bias, [m, k] by [k, n] and [n], fp32 of any strides on a CPU -> [m, n].

    The registered operator is for torch.compile; the way through it and back into Python takes 15 us.
    """
    return _registered(a, b, bias) if torch.compiler.is_compiling() else _product(a, b, bias)
