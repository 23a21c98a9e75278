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

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.reference.ema import average_

ENDLESS = 1e9
"""a step whose bias corrections are 1"""

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""parameters, gradients, exp_avgs, exp_avg_sqs"""


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
    found_inf: Tensor | None = None,
) -> None:
    """Update in place tensors that share dtype and device.

    steps: this step's number, counted from 1, or it as one 0-dim device tensor per parameter (capturable);
        all are equal. grads are scaled in place by the fused kernel when a clip factor is given.
    found_inf: 0-dim; when it is not 0, nothing changes.
    """
    # torch's fused kernel on a CPU walks memory, not strides, and wants one dtype
    grads = [
        g if g.stride() == p.stride() and g.dtype == p.dtype else torch.empty_like(p).copy_(g)
        for p, g in zip(params, grads, strict=True)
    ]
    scalars = _Scalars(lr, betas, eps, weight_decay, eps_mode, clip_factor)
    tensors = (params, grads, exp_avgs, exp_avg_sqs)
    if torch.compiler.is_compiling() and isinstance(steps, list):
        for each in zip(*tensors, strict=True):
            _traced(*each, steps[0], scalars, found_inf)
    elif isinstance(steps, list) or isinstance(lr, Tensor):
        step = steps[0] if isinstance(steps, list) else torch.tensor(steps, device=params[0].device)
        _fused_on_device(tensors, step, scalars, found_inf)
    else:
        _fused(tensors, steps, scalars)
    if found_inf is not None and ema_decay is not None:
        ema_decay = decay_unless(found_inf, ema_decay)
    for p, low in zip(params, copies, strict=True):
        if low is not None:
            low.copy_(p)
    if ema_decay is not None:
        pairs = [
            (t, p, low) for t, p, low in zip(teachers, params, teacher_copies, strict=True) if t is not None
        ]
        average_([t for t, _, _ in pairs], [p for _, p, _ in pairs], ema_decay, [low for _, _, low in pairs])


def decay_unless(found_inf: Tensor, decay: float | Tensor) -> Tensor:
    """The decay, or 1 where found_inf is not 0; 0-dim fp64, since fp32 would leave 1 - 0.99999 two digits."""
    return torch.where(found_inf == 0, _on_device(decay, torch.float64, found_inf.device), 1.0)


class _Scalars(NamedTuple):
    """What is the same for all tensors of a call."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    eps_mode: str
    clip_factor: float | Tensor | None


def _fused(tensors: _Lists, step: float, s: _Scalars) -> None:
    """Step and lr are numbers; fairseq's eps is made torch's."""
    # On a CPU the factor can be looked at for free, and 1 spares the kernel a write of every gradient.
    if s.clip_factor is not None and tensors[0][0].device.type == "cpu" and float(s.clip_factor) == 1.0:
        s = s._replace(clip_factor=None)
    if s.eps_mode == "fairseq":
        s = s._replace(eps=s.eps / (1.0 - s.betas[1] ** step) ** 0.5)
    _call_fused(tensors, _on_device(step, torch.float32, tensors[0][0].device), s)


def _fused_on_device(tensors: _Lists, step: Tensor, s: _Scalars, found_inf: Tensor | None) -> None:
    """Step and lr stay on the device.

    The kernel's eps is a number, and fairseq's as torch's would depend on the step. So there an endless step
    switches the kernel's bias corrections off; they go into lr, and weight decay is a pass of its own.
    """
    params = tensors[0]
    lr = _on_device(s.lr, torch.float64, params[0].device)
    if s.eps_mode == "fairseq":
        # fp64, because 1 - beta^t cancels; a skipped first step has t = 0 and changes nothing
        t = step.double().clamp(min=1.0)
        if s.weight_decay:
            shrink = 1.0 - lr * s.weight_decay
            if found_inf is not None:
                shrink = torch.where(found_inf == 0, shrink, 1.0)
            torch._foreach_mul_(params, shrink.to(params[0].dtype))
        lr = lr * (1.0 - s.betas[1] ** t).sqrt() / (1.0 - s.betas[0] ** t)
        s, step = s._replace(weight_decay=0.0), torch.full_like(step, ENDLESS)
    found = None if found_inf is None else (found_inf != 0).float()  # the kernel asks for 1
    _call_fused(tensors, step.float(), s._replace(lr=lr.float()), found)


def _call_fused(tensors: _Lists, step: Tensor, s: _Scalars, found_inf: Tensor | None = None) -> None:
    """torch's kernel, which knows its own eps mode only; it divides by its scale, as after loss scaling."""
    params = tensors[0]
    divisor = None
    if s.clip_factor is not None:
        divisor = _on_device(s.clip_factor, torch.float32, params[0].device).reciprocal()
    torch._fused_adamw_(
        *tensors,
        [],
        [step] * len(params),
        lr=s.lr,
        beta1=s.betas[0],
        beta2=s.betas[1],
        weight_decay=s.weight_decay,
        eps=s.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
        found_inf=found_inf,
    )


def _traced(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, s: _Scalars, found_inf: Tensor | None
) -> None:
    """One parameter in plain torch: the fused kernel with lr on the device has no meta function."""
    t = step.double().clamp(min=1.0)
    bias1, root_bias2 = 1.0 - s.betas[0] ** t, (1.0 - s.betas[1] ** t).sqrt()
    g = g if s.clip_factor is None else g * s.clip_factor
    new_m = m.lerp(g, 1.0 - s.betas[0])
    new_v = (v * s.betas[1]).addcmul(g, g, value=1.0 - s.betas[1])
    eps_on_root = s.eps if s.eps_mode == "fairseq" else s.eps * root_bias2
    new_p = p * (1.0 - s.lr * s.weight_decay) - new_m / (new_v.sqrt() + eps_on_root) * (
        s.lr * root_bias2 / bias1
    )
    for old, new in ((p, new_p), (m, new_m), (v, new_v)):
        old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))


def _on_device(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-dim; a number is filled in, since copying one from pageable memory would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


_ROW = 4096
"""values whose squares are summed in one go"""


@op_range("grad_norm/fwd/eager", _costs.grad_norm)
def grad_norm(grads: list[Tensor]) -> Tensor:
    """0-dim, on the first gradient's device: fp32, or fp64 where one of them is.

    PyTorch's CPU kernel adds a whole tensor up in one chain per vector lane, which loses small gradients of a
    large embedding (4e-4 of its norm): norms of rows, and the norm of those, keep all digits.
    """
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    groups: defaultdict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for g in grads:
        groups[g.dtype, g.device].append(g.detach())
    norms: list[Tensor] = []
    for (_, device), group in groups.items():
        norms += _row_norms(group, wide) if device.type == "cpu" else torch._foreach_norm(group, 2.0, wide)
    return torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms]))


def _row_norms(group: list[Tensor], wide: torch.dtype) -> list[Tensor]:
    """Norms of tensors of any size, first along rows of `_ROW`."""
    norms = []
    for g in group:
        flat = g.reshape(-1)
        whole = flat.shape[0] // _ROW * _ROW
        rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=wide)
        norms += [torch.linalg.vector_norm(part, dtype=wide) for part in (rows, flat[whole:])]
    return norms
