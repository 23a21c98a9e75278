"""One layer of the speech feature encoder: strided convolution -> affine LayerNorm -> GELU, channels-last."""

import torch
from torch import Tensor

from d2vkern import _autocast
from d2vkern._backend import select
from d2vkern._checks import check_convolution, check_dtype, check_range, check_same_device, check_shape


def conv_stem(
    x: Tensor,
    weight: Tensor,
    stride: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """gelu(LayerNorm(conv1d(x, stride), norm_weight, norm_bias)), without padding and convolution bias.

    x: (B, T, C) fp32, bf16, fp16 or fp64 (eager only); the waveform is (B, samples, 1).
        Copied unless contiguous.
    weight: (O, C, k), norm_weight, norm_bias: (O,): x's dtype, or fp32 masters, which are cast.
    Returns (B, (T - k) // stride + 1, O) in x's dtype, under torch.autocast in its; statistics in fp32.
    Gradients: x and all weights.
    Source: fairseq models/wav2vec/wav2vec2.py, ConvFeatureExtractionModel with mode="layer_norm".
    Raises ValueError when T is shorter than the kernel, or C, O or k is 0, ValueError or TypeError for
    shapes, dtypes or devices that do not fit.
    """
    op = "conv_stem"
    check_dtype(op, "x", x)
    check_shape(op, "x", x, ("B", "T", "C"))
    check_shape(op, "weight", weight, ("O", x.shape[2], "k"), like="x")
    check_convolution(op, weight)
    check_range(op, "x frames T", x.shape[1], minimum=weight.shape[2])
    check_range(op, "stride", stride, minimum=1)
    check_shape(op, "norm_weight", norm_weight, (weight.shape[0],), like="weight")
    check_shape(op, "norm_bias", norm_bias, (weight.shape[0],), like="weight")
    x, weight, norm_weight, norm_bias = _autocast.for_product(x, weight, norm_weight, norm_bias)
    for name, value in (("weight", weight), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_dtype(op, name, value, (x.dtype, torch.float32))
    check_same_device(op, x=x, weight=weight, norm_weight=norm_weight, norm_bias=norm_bias)
    check_range(op, "eps", eps, minimum=0.0)
    return select("conv_stem", backend, x).conv_stem(x, weight, stride, norm_weight, norm_bias, eps)
