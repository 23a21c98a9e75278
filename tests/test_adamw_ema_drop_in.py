"""AdamWEMA where a trainer makes and calls the optimizer: torch's arguments, decay and teacher of its own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2vkern import EMA, AdamWEMA, use_backend


@pytest.fixture(autouse=True)
def on_eager():
    with use_backend("eager"):
        yield


class Model(nn.Module):
    """Parameters of equal shapes, a frozen one; floating and integer buffers, one of which is made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.detach().sum(0)
        return self.second(self.norm(self.first(x)))


def warm(step: int) -> float:
    return 1.0 - 1.0 / (step + 1)


def run(model: Model, optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        with torch.no_grad():
            model.frozen += 1
        optimizer.step()


def pair() -> tuple[Model, Model]:
    model = Model()
    return model, copy.deepcopy(model).requires_grad_(False)


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("form", ["number", "schedule", "tensor"])
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_a_trainer_that_passes_nothing_to_step(buffers: Any, form: str) -> None:
    """As torch's AdamW and an average beside it; the module's buffers follow as timm's do, or data2vec's."""
    model, teacher = pair()
    twin = copy.deepcopy(model)
    decay: Any = {"number": 0.7, "schedule": warm, "tensor": torch.tensor(0.7, dtype=torch.float64)}[form]
    optimizer = AdamWEMA(
        trained(model), 0.1, (0.8, 0.9), 1e-6, 0.1, False, fused=True, foreach=None, maximize=False,
        differentiable=False, teacher=teacher, model=model, ema_decay=decay, teacher_buffers=buffers,
    )  # fmt: skip
    ema = EMA(twin, 0.7, like="timm", exclude_buffers=buffers == "copy")
    plain = torch.optim.AdamW(trained(twin), 0.1, (0.8, 0.9), 1e-6, 0.1)
    run(model, optimizer, range(1))
    for step in range(6):
        if step:
            run(model, optimizer, range(step, step + 1))
        run(twin, plain, range(step, step + 1))
        if form == "schedule":
            ema.decay = warm(step + 1)
        ema.update(twin)
        ema.module.frozen.copy_(twin.frozen)  # which AdamWEMA copies, and timm averages
        assert_same(model, twin)
        assert_same(teacher, ema.module)
    assert teacher.norm.num_batches_tracked == 6


def test_what_step_is_given_goes_first() -> None:
    model, teacher = pair()
    before = copy.deepcopy(teacher)
    optimizer = AdamWEMA(model.parameters(), 0.1, teacher=list(teacher.parameters()), ema_decay=0.5)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step(ema_decay=1.0)
    assert_same(teacher, before)
    optimizer.ema_decay = 0.0
    optimizer.step()
    assert torch.equal(teacher.first.weight, model.first.weight)


def by_state_dict(optimizer: AdamWEMA, model: Model, teacher: Model) -> tuple[AdamWEMA, Model, Model]:
    model, teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    fresh = AdamWEMA(trained(model), teacher=teacher, model=model, ema_decay=warm)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh, model, teacher


def by_pickle(*together: Any) -> Any:
    return pickle.loads(pickle.dumps(together))


def by_file(*together: Any) -> Any:
    file = io.BytesIO()
    torch.save(together, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("saved", [lambda *all: copy.deepcopy(all), by_pickle, by_file, by_state_dict],
                         ids=["deepcopy", "pickle", "torch.save", "state dict"])  # fmt: skip
def test_schedules_and_buffers_go_on(saved: Callable[..., Any]) -> None:
    model, teacher = pair()
    optimizer = AdamWEMA(trained(model), 0.1, teacher=teacher, model=model, ema_decay=warm)
    run(model, optimizer, range(3))
    other, its_model, its_teacher = saved(optimizer, model, teacher)
    before = copy.deepcopy(teacher)
    run(its_model, other, range(3, 6))
    assert_same(teacher, before)
    run(model, optimizer, range(3, 6))
    assert_same(its_model, model)
    assert_same(its_teacher, teacher)


def test_a_schedule_counts_on_from_a_state_put_in_by_hand() -> None:
    asked: list[int] = []

    def decay(step: int) -> float:
        asked.append(step)
        return 0.5

    p = nn.Parameter(torch.ones(2))
    optimizer = AdamWEMA([p], teacher=[torch.ones(2)], ema_decay=decay)
    optimizer.state[p] = {"step": torch.tensor(41.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.step(ema_decay=0.1)
    optimizer.step()
    assert asked == [42, 44]


def test_a_decay_that_does_not_fit_leaves_everything_alone() -> None:
    p, teacher = nn.Parameter(torch.ones(2)), torch.ones(2)
    optimizer = AdamWEMA([p], teacher=[teacher], ema_decay=lambda step: 1.5)
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="adamw_ema: ema_decay must be >= 0.0 and <= 1.0, got 1.5"):
        optimizer.step()
    assert float(optimizer.state[p]["step"]) == 0 and (p == 1).all() and (teacher == 1).all()


@pytest.mark.parametrize("form", ["model", "named params", "named list"])
def test_teachers_by_name(form: str) -> None:
    """In whatever order; by position the equal shapes of first and second would go unnoticed."""
    model, teacher = pair()
    swapped = dict(teacher.named_parameters())
    swapped = {name: swapped[name] for name in sorted(swapped, reverse=True)}
    optimizer = AdamWEMA(
        model.parameters() if form == "model" else model.named_parameters(), 0.1, ema_decay=0.0,
        teacher=list(swapped.items()) if form == "named list" else teacher,
        model=model if form == "model" else None,
    )  # fmt: skip
    run(model, optimizer, range(1))
    for name, p in model.named_parameters():
        assert torch.equal(dict(teacher.named_parameters())[name], p)


@pytest.mark.parametrize("average", [EMA, torch.optim.swa_utils.AveragedModel])
def test_an_average_is_a_teacher(average: Any) -> None:
    model = Model()
    ema = average(model)
    optimizer = AdamWEMA(trained(model), 0.1, teacher=ema, model=model, ema_decay=0.0)
    run(model, optimizer, range(1))
    assert_same(ema.module, model)


def test_parameters_in_the_place_of_others() -> None:
    """As accelerate puts DTensors there: their teachers would stay behind without a word."""
    model, teacher = pair()
    optimizer = AdamWEMA(trained(model), teacher=teacher, model=model, ema_decay=0.5)
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(
        RuntimeError, match="adamw_ema: params must be those that teachers and copies were given for"
    ):
        optimizer.step()


def test_learning_rate_schedulers_and_scalers_take_it() -> None:
    model, teacher = pair()
    optimizer = AdamWEMA(trained(model), 0.1, teacher=teacher, model=model, ema_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run(model, optimizer, range(2))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert torch.optim.AdamW(trained(model)).param_groups[0].keys() >= {"amsgrad", "fused"}
    torch.optim.AdamW(trained(model)).load_state_dict(optimizer.state_dict())


P = nn.Parameter(torch.ones(2))
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "amsgrad": (lambda: AdamWEMA([P], amsgrad=True), "amsgrad must be False, got True"),
    "maximize": (lambda: AdamWEMA([P], maximize=True), "maximize must be False, got True"),
    "differentiable": (lambda: AdamWEMA([P], differentiable=True), "differentiable must be False, got True"),
    "no teacher": (lambda: AdamWEMA([P], ema_decay=0.9), "ema_decay must come with teacher, got none"),
    "decay": (lambda: AdamWEMA([P], teacher=[torch.ones(2)], ema_decay=-1), "ema_decay must be >= 0.0"),
    "another order": (
        lambda: AdamWEMA([P, nn.Parameter(torch.ones(3))], teacher=[torch.ones(3), torch.ones(2)]),
        r"teacher\[0\] must have shape \(2,\) like params\[0\], got \(3,\)",
    ),
    "too few": (lambda: AdamWEMA([P], teacher=[]), "teacher must have 1 entries like params, got 0"),
    "no names": (
        lambda: AdamWEMA([P], teacher=nn.Linear(2, 2)),
        r"teacher by names must come with model, or params as named_parameters\(\), got neither",
    ),
    "another module": (
        lambda: AdamWEMA(nn.Linear(2, 2).named_parameters(), teacher=nn.Linear(2, 2, bias=False)),
        "teacher must have the names of the parameters, got a difference at bias",
    ),
    "another shape": (
        lambda: AdamWEMA(nn.Linear(2, 2).named_parameters(), teacher=nn.Linear(3, 2)),
        r"teacher weight must have shape \(2, 2\) like its parameter, got \(2, 3\)",
    ),
    "other buffers": (
        lambda: AdamWEMA([P], teacher=nn.BatchNorm1d(2, affine=False), model=nn.Module()),
        "teacher must have the buffers of model, got a difference at num_batches_tracked",
    ),
    "how": (
        lambda: AdamWEMA([P], teacher=nn.Module(), model=nn.Module(), **{"teacher_buffers": "none"}),
        "teacher_buffers must be one of 'average', 'copy', got 'none'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    make, words = REFUSALS[case]
    with pytest.raises(ValueError, match=f"adamw_ema: {words}"):
        make()
