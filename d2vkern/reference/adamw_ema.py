"""Eager AdamW, then the teacher's moving average, then the low-precision copies, for one list of parameters.

With t the step, g the gradient times the clip factor and bc_i = 1 - beta_i^t:
    p *= 1 - lr * weight_decay;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    torch:    p -= lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)
    fairseq:  p -= lr * sqrt(bc2) / bc1 * m / (sqrt(v) + eps)
fairseq's is torch's with eps / sqrt(bc2), so both run in torch's own fused kernel (CPU and CUDA). Measured at
91 M fp32 parameters on 2 cores, that kernel on whole lists followed by one foreach lerp took 72 ms (50 + 25
alone) and every split into chunks of 64 Ki to 2 Mi elements, which might keep p in cache between the two,
more (78 to 98 ms).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.reference.ema import average_


@op_range("adamw_ema/fwd/eager", _costs.adamw_ema)
def adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: float | list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    eps_mode: str,
    clip_factor: float | Tensor | None,
    teachers: Sequence[Tensor | None],
    ema_decay: float | Tensor | None,
    copies: Sequence[Tensor | None],
    teacher_copies: Sequence[Tensor | None],
) -> None:
    """Update in place tensors that share dtype and device.

    steps: this step's number, shared by all and counted from 1, or one 0-dim device tensor per parameter
        (capturable). grads are scaled in place by the fused kernel when a clip factor is given.
    """
    on_fused_device = params[0].device.type in ("cpu", "cuda")
    if on_fused_device and not isinstance(lr, Tensor) and not isinstance(steps, list):
        _fused(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            lr,
            betas,
            eps,
            weight_decay,
            eps_mode,
            clip_factor,
        )
    else:
        each_step = steps if isinstance(steps, list) else [torch.tensor(steps)] * len(params)
        for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, each_step, strict=True):
            g = g if clip_factor is None else g * clip_factor
            _plain(p, g, m, v, step, lr, betas, eps, weight_decay, eps_mode)
    for p, low in zip(params, copies, strict=True):
        if low is not None:
            low.copy_(p)
    if ema_decay is not None:
        pairs = [
            (t, p, low) for t, p, low in zip(teachers, params, teacher_copies, strict=True) if t is not None
        ]
        average_([t for t, _, _ in pairs], [p for _, p, _ in pairs], ema_decay, [low for _, _, low in pairs])


def _fused(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    eps_mode: str,
    clip_factor: float | Tensor | None,
) -> None:
    device = params[0].device
    grad_scale = None
    # On a CPU the factor can be looked at for free, and 1 spares the kernel a write of every gradient.
    if clip_factor is not None and not (device.type == "cpu" and float(clip_factor) == 1.0):
        # The kernel divides by its scale, as after loss scaling.
        grad_scale = torch.as_tensor(clip_factor, dtype=torch.float32, device=device).reciprocal()
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.full((), step, dtype=torch.float32, device=device)] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps / (1.0 - betas[1] ** step) ** 0.5 if eps_mode == "fairseq" else eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
    )


def _plain(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    eps_mode: str,
) -> None:
    """One parameter with step and lr on the device; 0-dim factors in fp64, because 1 - beta^t cancels."""
    bias1, root_bias2 = 1.0 - betas[0] ** step.double(), (1.0 - betas[1] ** step.double()).sqrt()
    p.mul_(1.0 - lr * weight_decay)
    m.lerp_(g, 1.0 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1.0 - betas[1])
    eps_on_root: float | Tensor = eps if eps_mode == "fairseq" else eps * root_bias2
    p.sub_((m / (v.sqrt() + eps_on_root)).mul_(lr * root_bias2 / bias1))
