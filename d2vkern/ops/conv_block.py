"""Convolution -> LayerNorm -> GELU (-> residual), channels-last: a decoder or positional layer."""

import torch
from torch import Tensor

from d2vkern import _autocast
from d2vkern._backend import select
from d2vkern._checks import (
    INTEGERS,
    check_convolution,
    check_dtype,
    check_range,
    check_same_device,
    check_shape,
)
from d2vkern.ops.masks import MaskPlan


def conv_block_1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    residual: bool = False,
    eps: float = 1e-5,
    *,
    plan: MaskPlan | None = None,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """gelu(LayerNorm(conv1d(x))) (+ x), the norm over channels, without affine.

    x: (N, T, C) fp32, bf16, fp16 or fp64 (eager only); (B, T, C) with `plan`. Copied unless contiguous.
    weight: (O, C // groups, k), bias: (O,) or None: x's dtype, or fp32 masters, which are cast.
        Padding is k // 2 on both sides; an even kernel drops the last output (the original's SamePad).
    residual: add x to the output; needs O == C, no plan.
    plan: read the unrepeated (B, T, C) with each version's masked places as zero; the output is (N, T, O).
    rows: (N, R) int32 or int64, places in [0, T), distinct within a row: only these outputs are made,
        (N, R, O). Values are not checked (that would wait for the device). Not together with plan.
    Returns x's dtype, under torch.autocast its; statistics in fp32. Gradients: x, weight, bias.
    Source: data2vec 2.0, models/modalities/modules.py, Decoder1d, and audio.py, positional encoder.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, ValueError when C, O or k is
    0.
    """
    op = "conv_block_1d"
    check_dtype(op, "x", x)
    check_shape(op, "x", x, ("N", "T", "C"))
    x, weight, bias = _checked(op, x, weight, bias, groups, residual, eps, ("k",))
    if plan is not None:
        check_shape(op, "x", x, (plan.samples, plan.tokens, x.shape[2]), like="plan")
        check_same_device(op, x=x, plan=plan.mask)
        if residual or rows is not None:
            raise ValueError(
                f"{op}: plan must come without residual and rows, got residual={residual}, rows={rows}"
            )
    if rows is not None:
        check_shape(op, "rows", rows, (x.shape[0], "R"), like="x")
        check_dtype(op, "rows", rows, INTEGERS)
        check_range(op, "places R of rows", rows.shape[1], maximum=x.shape[1])
        check_same_device(op, x=x, rows=rows)
    return select("conv_block", backend, x).conv_block_1d(x, weight, bias, groups, residual, eps, plan, rows)


def conv_block_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    residual: bool = False,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """gelu(LayerNorm(conv2d(x))) (+ x) on a channels-last grid; see `conv_block_1d`.

    x: (N, H, W, C). weight: (O, C // groups, k, k). Returns (N, H, W, O).
    Source: data2vec 2.0, models/modalities/modules.py, Decoder2d.
    """
    op = "conv_block_2d"
    check_dtype(op, "x", x)
    check_shape(op, "x", x, ("N", "H", "W", "C"))
    x, weight, bias = _checked(op, x, weight, bias, groups, residual, eps, ("k", "k"))
    return select("conv_block", backend, x).conv_block_2d(x, weight, bias, groups, residual, eps)


def _checked(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    residual: bool,
    eps: float,
    kernel: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias, as autocast has them."""
    channels = x.shape[-1]
    check_range(op, "groups", groups, minimum=1)
    if channels % groups:
        raise ValueError(f"{op}: groups must divide the {channels} channels of x, got {groups}")
    check_shape(op, "weight", weight, ("O", channels // groups, *kernel), like="x and groups")
    check_convolution(op, weight)
    if weight.shape[0] % groups:
        raise ValueError(
            f"{op}: groups must divide the {weight.shape[0]} output channels of weight, got {groups}"
        )
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), like="weight")
    if residual and weight.shape[0] != channels:
        raise ValueError(
            f"{op}: residual needs as many outputs as the {channels} channels, got {weight.shape[0]}"
        )
    check_range(op, "eps", eps, minimum=0.0)
    check_same_device(op, x=x, weight=weight, bias=bias)
    x, weight, bias = _autocast.for_product(x, weight, bias)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_dtype(op, name, value, (x.dtype, torch.float32))
    return x, weight, bias
