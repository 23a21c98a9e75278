"""Regression loss of data2vec 2.0 at the masked places, with its gradient made in the forward pass.

The B targets are read through the plan's masked positions for each of the M versions, never repeated to N
rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from d2vkern._backend import select
from d2vkern._checks import check_dtype, check_range, check_same_device, check_shape
from d2vkern.ops.masks import MaskPlan


class LossOutput(NamedTuple):
    """Four 0-dim tensors on the predictions' device; fp32 (fp64 for fp64 predictions) but for the count."""

    loss: Tensor
    """summed over masked tokens and D, times scale; the only one with a gradient"""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    """int64: masked tokens of all N rows, what the trainer divides by"""
    pred_var: Tensor
    """mean over D of sqrt(variance over masked tokens + 1e-6): near 1e-3 when predictions have collapsed"""
    target_var: Tensor
    """the same of the targets at those tokens (a token masked in several versions counts each time)"""


def masked_regression_loss(
    pred: Tensor,
    target: Tensor,
    plan: MaskPlan,
    beta: float = 0.0,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> LossOutput:
    """Squared error (or smooth L1) between predictions and targets at masked tokens, summed.

    pred: (N, T, D), of which only masked places are read, or (N, P, D): the masked places alone, in
        ascending order (P = plan.masked; what stands behind them in padded rows is not read).
        fp32, bf16, fp16 (maths in fp32) or fp64. (N, T, D) is copied unless contiguous.
    target: (B, T, D), any of these dtypes; a constant, it gets no gradient.
    plan: N = B * clones rows, row b*M+m from sample b.
    beta: 0 is squared error; above 0 is torch's smooth L1, quadratic below an error of beta.
    scale: factor on the loss; None is 1 / sqrt(D).

    The gradient has pred's dtype and is 0 at kept places and padding. It is made in the forward and scaled
    in place by the backward, so the loss has no second derivative. Neither a small scale nor a GradScaler's
    large factor costs fp16 predictions digits: both are applied in fp32 (errors beyond fp16's 65504 do give
    an infinite gradient). Variances are unbiased; with no masked token loss, count and variances are 0, with
    one the variance is taken as 0.
    Source: data2vec 2.0, examples/data2vec/models/data2vec2.py, `d2v_loss` and `compute_var`.

    Raises ValueError for shapes that do not fit the plan, a negative beta or tensors on different devices,
    TypeError for other dtypes.
    """
    rows, tokens = plan.mask.shape
    check_dtype("loss", "pred", pred)
    check_dtype("loss", "target", target)
    check_shape("loss", "pred", pred, (rows, None, None), like="plan")
    masked = plan.masked
    if pred.shape[1] != tokens and pred.shape[1] != masked:
        raise ValueError(
            f"loss: pred must have {tokens} tokens (all) or {masked} (the masked ones) per row, "
            f"got {pred.shape[1]}"
        )
    check_shape("loss", "target", target, (rows // plan.clones, tokens, pred.shape[2]), like="plan and pred")
    check_same_device("loss", pred=pred, target=target, plan=plan.mask)
    check_range("loss", "beta", beta, minimum=0.0)
    if scale is None:
        scale = 1.0 / math.sqrt(max(1, pred.shape[2]))
    implementation = select("loss", backend, pred, target)
    loss, pred_var, target_var = implementation.masked_regression_loss(pred, target, plan, beta, scale)
    if plan.kept_lengths is None:
        count = torch.full((), rows * masked, dtype=torch.int64, device=pred.device)
    else:
        count = plan.mask.sum()
    return LossOutput(loss, count, pred_var, target_var)
