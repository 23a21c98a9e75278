"""Schedules against fairseq's classes written out, clipping, parameter groups, the optimizer of a run."""

import math

import pytest
import torch
from torch import Tensor, nn

from d2v.config.fronts import ImageFront
from d2v.config.model import ModelConfig
from d2v.config.run import Config, EMAConfig, OptimConfig
from d2v.train.optim import (
    build_optimizer,
    clip_factor,
    learning_rate,
    param_groups,
    set_learning_rate,
    teacher_decay,
)


def fairseq_cosine(lr: float, min_lr: float, warmup: int, max_update: int) -> list[float]:
    """Learning rate of each update: CosineLRSchedule.step_update(0), then after every update."""
    period, lr_step = max_update - warmup, (lr - min_lr) / max(1, warmup)
    rates = []
    for num_updates in range(max_update):
        if num_updates < warmup:
            rates.append(min_lr + num_updates * lr_step)
        else:
            t_curr = num_updates - warmup
            rates.append(min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * t_curr / period)))
    return rates


def fairseq_tri_stage(
    lr: float, ratio: tuple[float, ...], final_scale: float, max_update: int
) -> list[float]:
    """TriStageLRSchedule with phase_ratio and init_lr_scale 0.01."""
    warmup, hold, decay = (int(max_update * r) for r in ratio)
    init_lr, rates = 0.01 * lr, []
    decay_factor = -math.log(final_scale) / decay
    for n in range(max_update):
        if n < warmup:
            rates.append(init_lr + (lr - init_lr) / warmup * n)
        elif n < warmup + hold:
            rates.append(lr)
        elif n <= warmup + hold + decay:
            rates.append(lr * math.exp(-decay_factor * (n - warmup - hold)))
        else:
            rates.append(final_scale * lr)
    return rates


def fairseq_polynomial(lr: float, end: float, power: float, warmup: int, total: int) -> list[float]:
    """PolynomialDecayLRSchedule.step_update."""
    rates = []
    for n in range(total):
        if warmup > 0 and n <= warmup:
            rates.append(n / warmup * lr)
        else:
            rates.append((lr - end) * (1 - (n - warmup) / (total - warmup)) ** power + end)
    return rates


def ours(cfg: OptimConfig, total: int) -> list[float]:
    return [learning_rate(cfg, step, total) for step in range(total)]


@pytest.mark.parametrize("min_lr", [0.0, 1e-5])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_cosine(warmup: int, min_lr: float) -> None:
    cfg = OptimConfig(lr=1e-3, warmup=warmup, min_lr=min_lr)
    assert ours(cfg, 50) == pytest.approx(fairseq_cosine(1e-3, min_lr, warmup, 50), rel=1e-12)


def test_the_first_update_of_a_cosine_warm_up_runs_at_zero_and_the_peak_follows_it() -> None:
    cfg = OptimConfig(lr=1e-3, warmup=10)
    assert learning_rate(cfg, 0, 50) == 0.0
    assert learning_rate(cfg, 1, 50) == pytest.approx(1e-4)
    assert learning_rate(cfg, 10, 50) == 1e-3
    assert learning_rate(cfg, 30, 50) == pytest.approx(5e-4)
    assert 0 < learning_rate(cfg, 49, 50) < 2e-6
    assert learning_rate(cfg, 50, 50) == learning_rate(cfg, 99, 50) == 0.0


def test_warm_up_longer_than_the_run() -> None:
    assert learning_rate(OptimConfig(lr=1.0, warmup=100), 10, 20) == pytest.approx(0.1)


@pytest.mark.parametrize("total", [50, 53])
def test_tri_stage(total: int) -> None:
    cfg = OptimConfig(lr=1e-4, schedule="tri_stage", stages=(0.1, 0.4, 0.5), end_scale=0.05)
    assert ours(cfg, total) == pytest.approx(fairseq_tri_stage(1e-4, (0.1, 0.4, 0.5), 0.05, total), rel=1e-9)
    assert learning_rate(cfg, total + 10, total) == pytest.approx(5e-6)


def test_tri_stage_without_decay_stage() -> None:
    cfg = OptimConfig(lr=1.0, schedule="tri_stage", stages=(0.5, 0.5, 0.0), end_scale=0.5)
    assert learning_rate(cfg, 9, 10) == 1.0 and learning_rate(cfg, 10, 10) == 0.5


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("warmup", [0, 6])
def test_polynomial(warmup: int, power: float) -> None:
    cfg = OptimConfig(lr=2e-5, schedule="polynomial", warmup=warmup, power=power, min_lr=1e-6)
    assert ours(cfg, 40) == pytest.approx(fairseq_polynomial(2e-5, 1e-6, power, warmup, 40), rel=1e-12)
    assert learning_rate(cfg, 40, 40) == 1e-6


def test_constant() -> None:
    cfg = OptimConfig(lr=1.0, schedule="constant", warmup=4)
    assert ours(cfg, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ours(OptimConfig(lr=1.0, schedule="constant"), 2) == [1.0, 1.0]


def test_teacher_decay() -> None:
    cfg = EMAConfig(decay=0.9, end_decay=1.0, anneal=10)
    assert [teacher_decay(cfg, n) for n in (1, 5, 10, 11)] == pytest.approx([0.91, 0.95, 1.0, 1.0])


def with_grads(*grads: list[float]) -> list[Tensor]:
    params = [torch.zeros(len(grad), requires_grad=True) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = torch.tensor(grad)
    return params


@pytest.mark.parametrize("max_norm", [None, 1.0, 5.0, 100.0])
def test_clip_factor_is_torchs_clipping_without_touching_gradients(max_norm: float | None) -> None:
    params = [*with_grads([3.0, 0.0], [4.0], []), torch.zeros(2, requires_grad=True)]
    norm, factor = clip_factor(params, max_norm)
    assert norm.item() == pytest.approx(5.0) and norm.shape == factor.shape == ()
    assert params[0].grad.tolist() == [3.0, 0.0]
    torch.nn.utils.clip_grad_norm_(params, math.inf if max_norm is None else max_norm)
    assert (3.0 * factor).item() == pytest.approx(params[0].grad[0].item(), rel=1e-6)


def test_clip_factor_shows_bad_gradients_and_takes_none() -> None:
    assert clip_factor(with_grads([1.0, math.nan]), 1.0)[0].isnan()
    assert clip_factor(with_grads([1.0, math.inf]), 1.0)[0].isinf()
    norm, factor = clip_factor([torch.zeros(2, requires_grad=True)], 1.0)
    assert norm.item() == 0.0 and factor.item() == 1.0


class Model(nn.Module):
    """Shapes and names of what decides on weight decay, and the teacher pairs of Data2Vec."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.alibi_scale = nn.Parameter(torch.ones(1, 1, 2, 1, 1))
        self.positions = nn.Parameter(torch.randn(1, 4, 2), requires_grad=False)
        self.teacher = nn.ParameterList([self.linear.weight.detach().clone(), self.positions.detach() + 1])
        self.teacher.requires_grad_(False)

    def teacher_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.teacher), [self.linear.weight, self.positions]


def test_parameter_groups() -> None:
    model = Model()
    (group,) = param_groups(model, OptimConfig(weight_decay=0.05))
    assert group["weight_decay"] == 0.05 and len(group["params"]) == 5
    groups = param_groups(model, OptimConfig(weight_decay=0.05, decay_all=False))
    decayed, exempt = sorted(groups, key=lambda group: -group["weight_decay"])
    assert decayed["weight_decay"] == 0.05 and [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert exempt["weight_decay"] == 0.0 and len(exempt["params"]) == 4


def make_config(**optim: object) -> Config:
    return Config(
        preset="test", model=ModelConfig(front=ImageFront(), dim=8, heads=2), optim=OptimConfig(**optim)
    )


def test_build_optimizer_is_wired_to_the_teacher() -> None:
    model = Model()
    cfg = make_config(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5, eps_mode="fairseq")
    groups = param_groups(model, cfg.optim)
    optimizer = build_optimizer(groups, cfg.optim, model.teacher_pairs(), capturable=False)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-3)
    assert (group["weight_decay"], group["eps_mode"]) == (0.5, "fairseq")
    weight = model.linear.weight.detach().clone()
    model.linear(torch.ones(1, 3)).sum().backward()
    optimizer.step(ema_decay=0.75)
    torch.testing.assert_close(model.teacher[0], 0.75 * weight + 0.25 * model.linear.weight.detach())
    assert not torch.equal(model.linear.weight, weight)
    assert torch.equal(model.teacher[1], model.positions)


def test_set_learning_rate_honours_layer_decay() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr_scale": 0.5}, {"params": [b]}], lr=1.0)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
