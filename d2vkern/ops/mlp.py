"""The transformer block's matrix products: its MLP with GELU, and a linear layer.

The MLP keeps only the pre-activation for backward.
"""

from typing import Literal

import torch
from torch import Tensor

from d2vkern import _autocast
from d2vkern._backend import select
from d2vkern._checks import (
    check_choice,
    check_dtype,
    check_range,
    check_rows,
    check_same_device,
    check_seed,
    check_shape,
)


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: Literal["none", "tanh"] = "none",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """gelu(x w1' + b1) w2' + b2.

    x: (..., D) fp32, bf16, fp16 or fp64 (eager only).
    w1: (F, D), b1: (F,) or None, w2: (O, F), b2: (O,) or None: x's dtype, or fp32 masters, which are cast.
    approximate: GELU as torch.nn.functional.gelu has it, exact ("none", by erf) or "tanh".
    dropout_p: in [0, 1), dropout between GELU and w2; seed: counter-based, None draws from torch's generator.
    Returns (..., O) in x's dtype, under torch.autocast in its. The (..., F) activation is not stored:
    backward recomputes it.
    Source: data2vec 2.0, models/modalities/modules.py, timm's Mlp inside AltBlock.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    op = "gelu_mlp"
    check_rows(op, "x", x)
    check_dtype(op, "x", x)
    check_shape(op, "w1", w1, ("F", x.shape[-1]), like="x")
    check_shape(op, "w2", w2, ("O", w1.shape[0]), like="w1")
    if b1 is not None:
        check_shape(op, "b1", b1, (w1.shape[0],), like="w1")
    if b2 is not None:
        check_shape(op, "b2", b2, (w2.shape[0],), like="w2")
    x, w1, b1, w2, b2 = _autocast.for_product(x, w1, b1, w2, b2)
    for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if value is not None:
            check_dtype(op, name, value, (x.dtype, torch.float32))
    check_same_device(op, x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    check_range(op, "dropout_p", dropout_p, minimum=0.0, below=1.0)
    seed = None if seed is None else check_seed(op, seed)
    check_choice(op, "approximate", approximate, ("none", "tanh"))
    return select("mlp", backend, x).gelu_mlp(x, w1, b1, w2, b2, dropout_p, seed, approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x weight' + bias, as torch.nn.functional.linear: for whoever computes on a CPU that is not Intel's.

    x: (..., D) fp32, bf16, fp16 or fp64 (eager only).
    weight: (O, D), bias: (O,) or None: x's dtype, or fp32 masters, which are cast; the bias's gradient is
        summed in the bias's dtype.
    Returns (..., O) in x's dtype, under torch.autocast in its.
    Backends: "eager" is PyTorch's product, and so is "triton"; "onednn" takes oneDNN's for fp32 on a CPU,
        about twice as fast on processors with AVX-512 that MKL does not use it on, and auto's choice there.
    Source: data2vec 2.0, models/modalities/modules.py, AltAttention's projections.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    op = "linear"
    check_rows(op, "x", x)
    check_dtype(op, "x", x)
    check_shape(op, "weight", weight, ("O", x.shape[-1]), like="x")
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), like="weight")
    x, weight, bias = _autocast.for_product(x, weight, bias)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_dtype(op, name, value, (x.dtype, torch.float32))
    check_same_device(op, x=x, weight=weight, bias=bias)
    return select("mlp", backend, x).linear(x, weight, bias)
