"""Masked regression loss: loss, gradient and the sums behind both variances in one pass over predictions.

Formula, e = pred - target at masked places: loss = scale sum e^2, gradient 2 scale e. With beta > 0 and
c = min(|e|, beta): loss = scale / beta sum c (|e| - c / 2), gradient scale / beta clamp(e, -beta, beta).
Variances are those of all masked places, per channel. An infinite prediction makes the loss NaN.

Layout: pred [N, T, D], or [N, P, D] with the P masked places of each row alone; target [B, T, D]; row
n = b * M + m; slot [N, T] is all that is read of a plan, of a padded one also how many tokens each row keeps:
then the count is added up on the device, and a compact gradient is cleared first. pred and target may have
any strides that are contiguous along D; others cost a copy. The gradient is contiguous, in pred's dtype.

Forward: two launches (loss_fwd.py). Backward scales the saved gradient in place by the incoming scalar, read
on the device, and by the powers of two that the forward left out (`split_factor`), in one launch; kept places
are 0 and are passed over. When the graph is kept for another backward the product goes to new memory instead.
A program of `loss_bwd_kernel` owns [BLOCK_R, BLOCK_D].

fp32 throughout but for pred and its gradient. The gradient is bit for bit eager's.

Bytes: pred at masked places, its gradient and the target once, which is the floor; plus 16 B T D / BLOCK_T of
moments, written and read, 1 to 5% at the presets' shapes. Backward: masked places of the gradient, twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._derivatives import first_order
from d2vkern._library import define
from d2vkern._nvtx import op_range
from d2vkern.kernels._launch import launch
from d2vkern.kernels._tuning import choose, power_of_two_bucket
from d2vkern.kernels.loss_fwd import forward, outputs
from d2vkern.ops.masks import MaskPlan
from d2vkern.reference.loss import graph_is_kept, split_factor


@triton.jit(do_not_specialize=["rows"])
def loss_bwd_kernel(
    grad_ptr,  # [R, D], contiguous
    dpred_ptr,  # [R, D], contiguous; grad_ptr itself when IN_PLACE
    dloss_ptr,  # []
    slot_ptr,  # [R] int32, negative where masked; None: every row is
    rest,  # what the saved gradient lacks
    rows,
    width,
    IN_PLACE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunks = tl.cdiv(width, BLOCK_D)
    # [BLOCK_R], [BLOCK_D]
    r = tl.program_id(0) // chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    live = r < rows
    if slot_ptr is not None:
        live = tl.load(slot_ptr + r, mask=r < rows, other=0) < 0
    # [BLOCK_R, BLOCK_D]
    at = r.to(tl.int64)[:, None] * width + d[None, :]
    wanted = live[:, None] & (d < width)[None, :]
    grad = tl.load(grad_ptr + at, mask=wanted, other=0.0).to(tl.float32)
    factor = tl.load(dloss_ptr).to(tl.float32) * tl.full((), rest, tl.float32)
    scaled = tl.where(wanted, grad * factor, 0.0)
    written = wanted if IN_PLACE else (r < rows)[:, None] & (d < width)[None, :]
    tl.store(dpred_ptr + at, scaled.to(dpred_ptr.dtype.element_ty), mask=written)


def masked_regression_loss(
    pred: Tensor, target: Tensor, plan: MaskPlan, beta: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (differentiable), pred_var and target_var, all 0-dim."""
    needs_grad = torch.is_grad_enabled() and pred.requires_grad
    return _MaskedRegression.apply(
        pred, target.detach(), plan.slot, plan.masked, plan.clones, beta, scale, needs_grad, plan.kept_lengths
    )


class _MaskedRegression(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        slot: Tensor,
        masked: int,
        clones: int,
        beta: float,
        scale: float,
        needs_grad: bool,
        kept_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, pred_var, target_var, grad = _fwd(
            pred, target, slot, masked, clones, beta, scale, needs_grad, kept_lengths
        )
        ctx.save_for_backward(grad, slot)
        ctx.settings = (masked, beta, scale)
        ctx.mark_non_differentiable(pred_var, target_var)
        ctx.set_materialize_grads(False)  # no zeros for the variances
        return loss, pred_var, target_var

    @staticmethod
    @first_order("loss")
    def backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 9
        grad, slot = ctx.saved_tensors
        if graph_is_kept():
            dpred = _bwd(grad, dloss, slot, *ctx.settings)
        else:
            _bwd_(grad, dloss, slot, *ctx.settings)
            dpred = grad
        return dpred, *(None,) * 8


def _cost(grad: Tensor, dloss: Tensor, slot: Tensor, masked: int, beta: float, scale: float) -> _costs.Cost:
    return _costs.Cost(_costs.bucket(N=slot.shape[0], masked=masked, D=grad.shape[-1])).of_backward()


@op_range("loss/bwd/triton", _cost)
def _scaled(grad: Tensor, dloss: Tensor, slot: Tensor, masked: int, beta: float, scale: float) -> Tensor:
    dpred = grad.new_empty(grad.shape)
    _scale(grad, dpred, dloss, slot, masked, split_factor(beta, scale)[1])
    return dpred


@op_range("loss/bwd/triton", _cost)
def _scaled_in_place(
    grad: Tensor, dloss: Tensor, slot: Tensor, masked: int, beta: float, scale: float
) -> None:
    _scale(grad, grad, dloss, slot, masked, split_factor(beta, scale)[1])


def _scale(grad: Tensor, dpred: Tensor, dloss: Tensor, slot: Tensor, masked: int, rest: float) -> None:
    rows, width = grad.shape[0] * grad.shape[1], grad.shape[2]
    candidates = [
        {"BLOCK_R": 16, "BLOCK_D": 256, "num_warps": 4},
        {"BLOCK_R": 8, "BLOCK_D": 256, "num_warps": 4},
        {"BLOCK_R": 32, "BLOCK_D": 256, "num_warps": 8},
    ]
    bucket = power_of_two_bucket(R=rows, D=width, item=grad.element_size())
    config = choose("loss_bwd_kernel", bucket, candidates)
    launch(
        loss_bwd_kernel,
        (triton.cdiv(rows, config["BLOCK_R"]) * triton.cdiv(width, config["BLOCK_D"]),),
        grad,
        dpred,
        dloss,
        slot.contiguous() if grad.shape[1] != masked else None,
        rest,
        rows,
        width,
        IN_PLACE=dpred is grad,
        **config,
    )


_fwd = define(
    "loss_fwd(Tensor pred, Tensor target, Tensor slot, SymInt masked, SymInt clones, float beta, "
    "float scale, bool needs_grad, Tensor? kept_lengths=None) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    outputs,
)
_bwd = define(
    "loss_bwd(Tensor grad, Tensor dloss, Tensor slot, SymInt masked, float beta, float scale) -> Tensor",
    _scaled,
    lambda grad, *_: grad.new_empty(grad.shape),
)
_bwd_ = define(
    "loss_bwd_(Tensor(a!) grad, Tensor dloss, Tensor slot, SymInt masked, float beta, float scale) -> ()",
    _scaled_in_place,
    lambda *_: None,
)
