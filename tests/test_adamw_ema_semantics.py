"""AdamWEMA as torch.optim.AdamW is used: groups, closures, states, scalers, clipping, masters, schedulers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2vkern import AdamWEMA, _native, use_backend
from d2vkern.testing import assert_bitwise_equal

BACKENDS = ["eager", "native"]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _native.problem():
        pytest.skip(_native.problem())
    with use_backend(request.param):
        yield request.param


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(step))
    dtype = next(model.parameters()).dtype
    return model(x.to(dtype)).float().square().mean()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [
        {"params": decayed, "weight_decay": 0.2, "lr": 0.02},
        {"params": others, "betas": (0.8, 0.9), "eps": 1e-5},
    ]


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def closure_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert (
            torch.equal(optimizer.step(closure), loss_of_before[step])
            if step == 0
            else optimizer.step(closure)
        )


loss_of_before = [loss_of(make_model(), 0).detach()]


def scheduled_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8, cycle_momentum=True)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step()


def clipped_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).mul(50).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def scaled_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """With an overflow in the second step, which is skipped and halves the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0


def frozen_and_added_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A parameter without gradient for a while, and a group that joins later."""
    extra = nn.Parameter(torch.ones(3))
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if step == 2:
            optimizer.add_param_group({"params": [extra], "lr": 0.3})
            model.extra = extra
        if step >= 2:
            loss = loss + extra.square().sum()
        loss.backward()
        if step == 1:
            next(model.parameters()).grad = None
        optimizer.step()


def resumed_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Through a state dict in a file's form, halfway."""
    plain_steps(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    fresh = type(optimizer)(groups(model), 1.0)
    fresh.load_state_dict(state)
    plain_steps(model, fresh)


LOOPS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "plain": plain_steps,
    "closure": closure_steps,
    "scheduler": scheduled_steps,
    "clipping": clipped_steps,
    "loss scaling": scaled_steps,
    "missing gradients and a new group": frozen_and_added_steps,
    "resumed": resumed_steps,
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_as_torch_adamw(name: str, capturable: bool) -> None:
    ours, theirs = make_model(), make_model()
    # capturable means nothing to torch on CPUs
    mine = AdamWEMA(groups(ours), 0.01, weight_decay=0.1, capturable=capturable)
    LOOPS[name](ours, mine)
    oracle = torch.optim.AdamW(groups(theirs), 0.01, weight_decay=0.1)
    LOOPS[name](theirs, oracle)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
    ours_by_name = dict(ours.named_parameters())
    assert all((ours_by_name[name] - p).abs().max() > 1e-3 for name, p in make_model().named_parameters())


def test_clip_factor_is_clipping_before_the_step() -> None:
    models = [make_model(), make_model()]
    optimizers = [AdamWEMA(model.parameters(), 0.01) for model in models]
    for step in range(3):
        for model in models:
            model.zero_grad()
            loss_of(model, step).mul(50).backward()
        norm = nn.utils.clip_grad_norm_(models[0].parameters(), 0.5)
        optimizers[0].step()
        optimizers[1].step(clip_factor=(0.5 / (norm + 1e-6)).clamp(max=1.0))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_of_low_precision_parameters(dtype: torch.dtype) -> None:
    """As an fp32 optimizer that sees the low-precision gradients; the parameter is its master, rounded."""
    low, wide = make_model().to(dtype), make_model().to(dtype).float()
    teachers = [p.detach().float() for p in low.parameters()]
    twins = [t.clone() for t in teachers]
    mine = AdamWEMA(low.parameters(), 1e-3, teacher=teachers, masters=True)
    oracle = AdamWEMA(wide.parameters(), 1e-3, teacher=twins)
    for step in range(20):
        low.zero_grad()
        loss_of(low, step).backward()
        for p, q in zip(low.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        mine.step(ema_decay=0.9)
        oracle.step(ema_decay=0.9)
    for p, q, t, twin in zip(low.parameters(), wide.parameters(), teachers, twins, strict=True):
        master = mine.state[p]["master"]
        assert master.dtype == mine.state[p]["exp_avg"].dtype == torch.float32
        assert_bitwise_equal(master, q.detach())
        assert_bitwise_equal(p.detach(), master.to(dtype))
        assert_bitwise_equal(t, twin)


def test_masters_hold_what_the_parameter_cannot() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamWEMA([p], 1e-4, weight_decay=0.0, masters=True)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["master"], torch.full((4,), 1 - 50e-4), rtol=1e-5, atol=0)
    assert (p < 1).all()


def test_masters_and_moments_survive_a_state_dict() -> None:
    model = make_model().bfloat16()
    optimizer = AdamWEMA(groups(model), 1e-3, masters=True)
    plain_steps(model, optimizer)
    twin = copy.deepcopy(model)
    fresh = AdamWEMA(groups(twin), 1.0, masters=True)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name in ("master", "exp_avg", "exp_avg_sq"):
            assert_bitwise_equal(fresh.state[q][name], optimizer.state[p][name])
            assert fresh.state[q][name].data_ptr() != optimizer.state[p][name].data_ptr()
    plain_steps(model, optimizer)
    plain_steps(twin, fresh)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


def test_a_state_of_torch_adamw_gets_masters() -> None:
    model = make_model().bfloat16()
    oracle = torch.optim.AdamW(model.parameters(), 1e-3)
    plain_steps(model, oracle)
    optimizer = AdamWEMA(model.parameters(), masters=True)
    optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
    for p in model.parameters():
        state = optimizer.state[p]
        assert_bitwise_equal(state["master"], p.detach().float())
        assert_bitwise_equal(state["exp_avg"], oracle.state[p]["exp_avg"].float())
        assert state["step"] == 4
    plain_steps(model, optimizer)
    torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.state_dict())


def test_without_a_gradient_the_teacher_follows_the_master() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    teacher = torch.zeros(3)
    optimizer = AdamWEMA([p], 1e-4, weight_decay=0.0, teacher=[teacher], masters=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    optimizer.step(ema_decay=0.0)
    assert_bitwise_equal(teacher, optimizer.state[p]["master"])
    assert not torch.equal(teacher, p.detach().float())


def test_refusals_about_masters() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="adamw_ema: params must have dtype float32 or float64, got bfloat16"):
        AdamWEMA([p])
    with pytest.raises(TypeError, match="adamw_ema: params must have dtype .*, got int64"):
        AdamWEMA([torch.zeros(2, dtype=torch.int64)], masters=True)
    with pytest.raises(ValueError, match="adamw_ema: copies must belong to fp32 parameters"):
        AdamWEMA([p], masters=True, copies=[torch.zeros(2)])
