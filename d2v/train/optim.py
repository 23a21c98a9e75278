"""Learning-rate schedules, gradient clipping, parameter groups and the optimizer of a run.

Schedules are fairseq's, including its count: an update's learning rate is looked up with the number of
updates done before it, so the first update of a warm-up from 0 runs at 0 (fairseq/trainer.py calls
`step_update` with 0 when it builds the optimizer and with n after update n).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2vkern.ops.adamw_ema import AdamWEMA, grad_norm
from d2vkern.ops.ema import annealed_decay

from ..config.run import EMAConfig, OptimConfig

# tri_stage: first learning rate over the peak (fairseq's init_lr_scale).
_TRI_STAGE_START = 0.01
# Keeps the clip factor finite at a zero gradient (fairseq's and torch's clip_grad_norm_).
_CLIP_EPS = 1e-6


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of an update.

    step: updates done before it, from 0.
    total_steps: updates of the whole run; from there on the schedule stays at its end.
    Warm-up takes `cfg.warmup` updates: linear from `min_lr` (cosine), from 0 (polynomial, constant);
    tri_stage has its own share of the run instead.
    Source: fairseq/optim/lr_scheduler/, cosine_lr, tri_stage_lr, polynomial_decay and fixed schedulers.
    """
    return _SCHEDULES[cfg.schedule](cfg, step, total_steps)


def teacher_decay(cfg: EMAConfig, step: int) -> float:
    """Decay of the teacher's update after optimizer step number `step`, counted from 1."""
    return annealed_decay(step, cfg.decay, cfg.end_decay, cfg.anneal)


def clip_factor(params: Iterable[Tensor], max_norm: float | None) -> tuple[Tensor, Tensor]:
    """What gradients must be multiplied by, without touching them.

    Returns (norm, factor), 0-dim on the gradients' device and not read on the host: their L2 norm, and
    min(1, max_norm / norm); max_norm None is no clipping. A NaN or inf gradient shows in the norm.
    """
    norm = grad_norm([p.grad for p in params if p.grad is not None])
    factor = torch.ones_like(norm)
    if max_norm is not None:
        factor = factor * (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
    return norm, factor


def param_groups(
    model: nn.Module, cfg: OptimConfig, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """Trained parameters by weight decay and `lr_scale` of their names, which `set_learning_rate` reads.

    Without `decay_all` biases, other 1-D parameters and ALiBi scales are not decayed: what the original's
    overrides ask for and its optimizer ignores (fairseq, FairseqCompositeOptimizer).
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            exempt = p.dim() == 1 or name.endswith(".bias") or "alibi_scale" in name
            decay = 0.0 if exempt and not cfg.decay_all else cfg.weight_decay
            groups.setdefault((decay, lr_scale(name)), []).append(p)
    return [
        {"params": some, "weight_decay": decay, "lr_scale": scale} for (decay, scale), some in groups.items()
    ]


def build_optimizer(
    groups: list[dict[str, Any]],
    cfg: OptimConfig,
    pairs: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
    *,
    capturable: bool,
) -> AdamWEMA:
    """The optimizer over `param_groups`. pairs: the teacher's tensors and the student's that they follow."""
    teacher, student = pairs
    return AdamWEMA(
        groups,
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        eps_mode=cfg.eps_mode,
        teacher=dict(zip(student, teacher, strict=True)),
        capturable=capturable,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Put `lr` into every group, times the group's `lr_scale` (layer decay) where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _cosine(cfg: OptimConfig, step: int, total_steps: int) -> float:
    if step < cfg.warmup:
        return cfg.min_lr + (cfg.lr - cfg.min_lr) * step / cfg.warmup
    if step >= total_steps:
        return cfg.min_lr
    progress = (step - cfg.warmup) / (total_steps - cfg.warmup)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1.0 + math.cos(math.pi * progress))


def _tri_stage(cfg: OptimConfig, step: int, total_steps: int) -> float:
    warmup, hold, decay = (int(total_steps * share) for share in cfg.stages)
    if step < warmup:
        return cfg.lr * (_TRI_STAGE_START + (1.0 - _TRI_STAGE_START) * step / warmup)
    if step < warmup + hold:
        return cfg.lr
    if step >= warmup + hold + decay:
        return cfg.lr * cfg.end_scale
    return cfg.lr * cfg.end_scale ** ((step - warmup - hold) / decay)


def _polynomial(cfg: OptimConfig, step: int, total_steps: int) -> float:
    if cfg.warmup > 0 and step <= cfg.warmup:
        return cfg.lr * step / cfg.warmup
    if step >= total_steps:
        return cfg.min_lr
    remaining = 1.0 - (step - cfg.warmup) / (total_steps - cfg.warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * remaining**cfg.power


def _constant(cfg: OptimConfig, step: int, total_steps: int) -> float:
    # fairseq's `fixed` counts from 1 here: its first update already moves.
    return cfg.lr * min(1.0, (step + 1) / cfg.warmup) if cfg.warmup > 0 else cfg.lr


_SCHEDULES = {"cosine": _cosine, "tri_stage": _tri_stage, "polynomial": _polynomial, "constant": _constant}
