"""Eager maths of the masked regression loss: loss, gradient and variances in one walk over slices of rows.

Formula, e = pred - target at masked places: loss = scale * sum e^2, gradient 2 * scale * e; with beta > 0 and
c = min(|e|, beta): loss = scale * sum c * (|e| - c/2) / beta, gradient scale * clamp(e / beta, -1, 1). A
slice of targets is gathered, used and dropped, so nothing of size [N,T,D] exists but the gradient itself,
which is what the backward needs. It is saved in pred's dtype before the powers of two of its scale, so that
of a small scale fp16 loses nothing; they come in backward, with a loss scaling that may undo them, in fp32.
Of a padded plan the places that count are marked, and the others become 0.
fp32 throughout (fp64 for fp64 predictions). Shape suffixes: R rows of a slice, P masked tokens of a row, D
width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._derivatives import first_order
from d2vkern._nvtx import op_range
from d2vkern.ops.masks import MaskPlan
from d2vkern.reference._common import SLICE

_VARIANCE_EPS = 1e-6


def masked_regression_loss(
    pred: Tensor, target: Tensor, plan: MaskPlan, beta: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (differentiable), pred_var and target_var, all 0-dim."""
    needs_grad = torch.is_grad_enabled() and pred.requires_grad
    ids_NP, live_NP = plan.ids_mask.long(), None
    if plan.kept_lengths is not None and pred.shape[1] == plan.tokens:
        live_NP = plan.mask
        ids_NP = torch.arange(plan.tokens, device=pred.device).expand_as(live_NP)
    elif plan.kept_lengths is not None:
        live_NP = ids_NP >= 0
        ids_NP = ids_NP.clamp(min=0)
    return _MaskedRegression.apply(
        pred, target.detach(), ids_NP, live_NP, plan.clones, beta, scale, needs_grad
    )


class _MaskedRegression(torch.autograd.Function):
    @staticmethod
    @op_range("loss/fwd/eager", _costs.loss)
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        ids_mask: Tensor,
        live: Tensor | None,
        clones: int,
        beta: float,
        scale: float,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, pred_var, target_var, grad = _walk(
            pred, target, ids_mask, live, clones, beta, scale, needs_grad
        )
        ctx.save_for_backward(grad)
        ctx.rest = split_factor(beta, scale)[1]
        ctx.mark_non_differentiable(pred_var, target_var)
        ctx.set_materialize_grads(False)  # no zeros for the variances
        return loss, pred_var, target_var

    @staticmethod
    @first_order("loss")
    @op_range("loss/bwd/eager")
    def backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 8
        (slope,) = ctx.saved_tensors
        # of one dimension: as a scalar it would be rounded to the slope's dtype first
        factor = (dloss * ctx.rest).view(1)
        return _scaled(slope, factor), *(None,) * 7


def _scaled(slope: Tensor, factor: Tensor) -> Tensor:
    """slope * factor in factor's dtype, rounded once, into the slope's memory unless that is needed again."""
    if torch.compiler.is_compiling():
        return (slope * factor).to(slope.dtype)
    out = torch.empty_like(slope) if graph_is_kept() else slope
    # a CPU makes a copy in factor's dtype of what it works on
    size = SLICE if slope.device.type == "cpu" else max(1, slope.numel())
    for part, whence in zip(out.view(-1).split(size), slope.view(-1).split(size), strict=True):
        torch.mul(whence, factor, out=part)
    return out


def graph_is_kept() -> bool:
    """Whether this backward may run again (retain_graph) and so must leave what it saved alone."""
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def split_factor(beta: float, scale: float) -> tuple[float, float]:
    """(kept, rest): the gradient is clamp(e, -beta, beta) * kept * rest (e itself with beta = 0).

    The part with `kept` is saved; it is about e, or about clamp(e / beta, -1, 1) with beta < 1. `rest` is a
    power of two, hence exact, but under torch.compile, where the scale may be a symbol.
    """
    factor = 2.0 * scale if beta == 0.0 else scale / beta
    steep = 1.0 if beta == 0.0 else min(beta, 1.0)
    if torch.compiler.is_compiling():
        return 1.0 / steep, factor * steep
    mantissa, exponent = math.frexp(factor)
    up = 1 - math.frexp(steep)[1]
    return math.ldexp(mantissa, up), math.ldexp(1.0, exponent - up)


def _walk(
    pred: Tensor,
    target: Tensor,
    ids_mask: Tensor,
    live: Tensor | None,
    clones: int,
    beta: float,
    scale: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss, pred_var, target_var and the gradient without `rest`, in pred's shape and dtype (None unless
    needed).

    live: [N,P] bool, which places of pred [N,P,D] count; None: all of them.
    """
    rows, masked = ids_mask.shape
    tokens, width = target.shape[1:]
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    every_token = pred.shape[1] != masked
    new_grad = torch.zeros_like if every_token else torch.empty_like
    grad = new_grad(pred, memory_format=torch.contiguous_format) if needs_grad else None
    if rows * masked * width == 0:
        nothing = torch.zeros((), dtype=dtype, device=pred.device)
        return nothing, nothing.clone(), nothing.clone(), grad

    row = torch.arange(rows, device=pred.device).unsqueeze(1)
    pred_ids_NP = row * tokens + ids_mask
    target_ids_NP = row // clones * tokens + ids_mask
    flat_pred, flat_target = pred.reshape(-1, width), target.reshape(-1, width)
    values = []
    pred_moments, target_moments = _Moments(pred, dtype), _Moments(pred, dtype)
    for some in _slices(rows, clones, masked * width, pred.device):
        x_RPD = (flat_pred[pred_ids_NP[some]] if every_token else pred[some]).to(dtype)
        y_RPD = flat_target[target_ids_NP[some]].to(dtype)
        counts = None if live is None else live[some]
        if counts is not None:
            x_RPD, y_RPD = (part.masked_fill(~counts[..., None], 0.0) for part in (x_RPD, y_RPD))
        pred_moments.add(x_RPD, counts)
        target_moments.add(y_RPD, counts)
        value, slope_RPD = _penalty(x_RPD - y_RPD, beta, scale)
        values.append(value)
        if grad is not None and every_token:
            grad.view(-1, width)[pred_ids_NP[some]] = slope_RPD.to(grad.dtype)
        elif grad is not None:
            grad[some] = slope_RPD
    return torch.stack(values).sum(), pred_moments.spread(), target_moments.spread(), grad


def _slices(rows: int, clones: int, row_size: int, device: torch.device) -> list[slice]:
    """Row slices: as many rows as fit the cache on a CPU, one version m of all samples elsewhere."""
    if device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, SLICE // row_size)
        return [slice(start, start + step) for start in range(0, rows, step)]
    return [slice(m, None, clones) for m in range(clones)]


def _penalty(error: Tensor, beta: float, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled penalty summed to 0-dim, and the part of its slope that is saved, per element."""
    kept, _ = split_factor(beta, scale)
    if beta == 0.0:
        return error.square().sum() * scale, error * kept
    size = error.abs()
    clipped = size.clamp(max=beta)
    value = (clipped * (size - 0.5 * clipped)).sum() * (scale / beta)
    return value, error.clamp(-beta, beta) * kept


class _Moments:
    """Mean and squared deviations per channel of all tokens seen, merged slice by slice (Chan et al.)."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.count: int | Tensor = 0
        self.mean = like.new_zeros(like.shape[-1], dtype=dtype)
        self.squares = torch.zeros_like(self.mean)

    def add(self, x_RPD: Tensor, live_RP: Tensor | None) -> None:
        """live_RP: which tokens count, None: all; the others are 0."""
        x = x_RPD.flatten(0, 1)
        if live_RP is None:
            more: int | Tensor = x.shape[0]
            mean = x.mean(0)
            squares = (x - mean).square().sum(0)
            count = share = self.count + more
        else:
            more = live_RP.sum().to(x.dtype)
            mean = x.sum(0) / more.clamp(min=1)
            squares = (x - mean).masked_fill(~live_RP.flatten()[:, None], 0.0).square().sum(0)
            count = self.count + more
            share = count.clamp(min=1)
        delta = mean - self.mean
        self.mean = self.mean + delta * (more / share)
        self.squares = self.squares + squares + delta.square() * (self.count * more / share)
        self.count = count

    def spread(self) -> Tensor:
        """Mean over channels of sqrt(unbiased variance + eps), 0-dim."""
        others = self.count - 1
        others = others.clamp(min=1) if isinstance(others, Tensor) else max(1, others)
        return (self.squares / others + _VARIANCE_EPS).sqrt().mean()
