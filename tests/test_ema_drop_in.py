"""EMA in the place of timm's ModelEmaV3 and torch's AveragedModel: the same arguments, the same numbers.

timm's class is written out here from timm/utils/model_ema.py (1.0.x), so that timm need not be installed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

from d2vkern import EMA


class Model(nn.Module):
    """Trained and frozen parameters, floating and integer buffers, one of them not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.positions = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("scale", torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.scale + self.positions


class TimmEma(nn.Module):
    """ModelEmaV3."""

    def __init__(self, model: nn.Module, **given: Any) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.given: dict[str, Any] = {
            "decay": 0.9999,
            "min_decay": 0.0,
            "update_after_step": 0,
            "use_warmup": False,
            "warmup_gamma": 1.0,
            "warmup_power": 2 / 3,
            "exclude_buffers": False,
        } | given

    def get_decay(self, step: int | None = None) -> float:
        given = self.given
        if step is None:
            return given["decay"]
        step = max(0, step - given["update_after_step"] - 1)
        if step <= 0:
            return 0.0
        if not given["use_warmup"]:
            return given["decay"]
        decay = 1 - (1 + step / given["warmup_gamma"]) ** -given["warmup_power"]
        return max(min(decay, given["decay"]), given["min_decay"])

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        weight = 1.0 - self.get_decay(step)
        if self.given["exclude_buffers"]:
            pairs = list(zip(self.module.parameters(), model.parameters(), strict=True))
            for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
                ours.copy_(theirs)
        else:
            pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        for ours, theirs in pairs:
            if ours.is_floating_point():
                ours.lerp_(theirs, weight=weight)
            else:
                ours.copy_(theirs)


def move(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            if x.is_floating_point():
                x.add_(torch.randn(x.shape, generator=generator))
            else:
                x.add_(step + 1)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """Every number of the averaged modules; not the count of updates, which timm has not."""
    mine, other = ours.module.state_dict(), theirs.module.state_dict()
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=2e-6, atol=1e-6)


TIMM = {
    "defaults": {"like": "timm"},
    "decay": {"decay": 0.9, "exclude_buffers": False},
    "buffers copied": {"decay": 0.9, "exclude_buffers": True},
    "later": {"decay": 0.9, "update_after_step": 3},
    "warm-up": {"decay": 0.9, "use_warmup": True},
    "warm-up, own curve": {"decay": 0.7, "use_warmup": True, "warmup_gamma": 2.0, "warmup_power": 0.75},
    "warm-up from a floor": {"decay": 0.95, "use_warmup": True, "min_decay": 0.6, "update_after_step": 2},
    "foreach": {"foreach": True, "decay": 0.5},
}


@pytest.mark.parametrize("with_steps", [True, False], ids=["steps", "no steps"])
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, with_steps: bool) -> None:
    given = TIMM[name]
    theirs_take = {k: v for k, v in given.items() if k not in ("like", "foreach")}
    model = Model()
    ours, theirs = EMA(model, **given), TimmEma(model, **theirs_take)
    for step in range(1, 9):
        move(model, step)
        assert ours.get_decay(step) == pytest.approx(theirs.get_decay(step), abs=1e-12)
        ours.update(model, step if with_steps else None)
        theirs.update(model, step if with_steps else None)
        assert_same_state(ours, theirs)
    assert ours.get_decay() == theirs.get_decay()


def test_timm_state_round_trip_and_set() -> None:
    model = Model()
    ours, theirs = EMA(model, 0.9, like="timm"), TimmEma(model, decay=0.9)
    move(model, 1)
    ours.update(model, 5)
    theirs.load_state_dict(ours.state_dict())
    assert_same_state(ours, theirs)
    move(model, 2)
    theirs.update(model, 6)
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs)
    ours.set(model)
    for name, x in model.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], x)


def test_timm_itself_where_it_is_installed() -> None:
    timm = pytest.importorskip(
        "timm.utils", reason="timm is not installed; its formulas are written out above"
    )
    for given in TIMM.values():
        given = {k: v for k, v in given.items() if k != "like"}
        model = Model()
        ours, theirs = EMA(model, like="timm", **given), timm.ModelEmaV3(model, **given)
        for step in range(1, 9):
            move(model, step)
            ours.update(model, step)
            theirs.update(model, step)
            assert_same_state(ours, theirs)


def test_timm_by_position() -> None:
    names = ["model", "decay", "min_decay", "update_after_step", "use_warmup", "warmup_gamma", "warmup_power"]
    names += ["device", "dtype", "stochastic_rounding", "stochastic_rounding_seed", "foreach"]
    names += ["exclude_buffers"]
    parameters = inspect.signature(EMA).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names
    model = Model()
    given = (0.99, 0.1, 2, True, 2.0, 0.75)
    ours, theirs = EMA(model, *given), TimmEma(model, **dict(zip(names[1:], given, strict=False)))
    for step in range(1, 9):
        move(model, step)
        ours.update(model, step)
        theirs.update(model, step)
        assert_same_state(ours, theirs)
    assert EMA(model, 0.99, 0.1).get_decay() == 0.99


def test_settings_are_attributes() -> None:
    """As timm's and torch's are, which trainers change as they go."""
    model = Model()
    ours, theirs = EMA(model, 0.9, like="timm"), TimmEma(model, decay=0.9)
    for step, changed in enumerate(({}, {"decay": 0.5}, {"use_warmup": True}, {"warmup_power": 0.9}), 2):
        for name, value in changed.items():
            setattr(ours, name, value)
            assert getattr(ours, name) == value
        theirs.given |= changed
        move(model, step)
        ours.update(model, step)
        theirs.update(model, step)
        assert_same_state(ours, theirs)
    with pytest.raises(ValueError, match="ema: decay must be >= 0.0 and <= 1.0, got 2.0"):
        ours.decay = 2.0
    assert ours.decay == 0.5
    with pytest.raises(
        AttributeError, match="ema: end_decay must be set on an average that has it, got TimmRule"
    ):
        ours.end_decay = 1.0
    with pytest.raises(AttributeError, match="end_decay"):
        _ = ours.end_decay
    torchs = EMA(model, like="torch")
    torchs.avg_fn = mean
    assert torchs.avg_fn is mean and copy.deepcopy(torchs).avg_fn is mean
    data2vecs = EMA(model, 0.5)
    data2vecs.decay = 0.25
    assert data2vecs.decay_at(7) == 0.25


def test_dtype_of_the_copy() -> None:
    model = Model().bfloat16()
    for given, dtype in (
        ({}, torch.float32),
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": torch.float64}, torch.float64),
    ):
        ema = EMA(model, 0.9998, stochastic_rounding=True, stochastic_rounding_seed=3, **given)
        assert {x.dtype for x in ema.module.parameters()} == {dtype}
        before = ema.module.linear.weight.clone()
        with torch.no_grad():
            model.linear.weight.add_(1.0)
        ema.update(model)
        expected = before + (model.linear.weight.to(dtype) - before) * (1 - 0.9998)
        torch.testing.assert_close(ema.module.linear.weight, expected, rtol=1e-6, atol=1e-6)
        assert ema.module.norm.num_batches_tracked.dtype == torch.int64
    for wrong, words in (
        ({"dtype": torch.bfloat16}, "dtype must be float32 or float64 .* got torch.bfloat16"),
        ({"decay": "cuda"}, "decay must be a number .* got 'cuda'"),
    ):
        with pytest.raises(TypeError, match=f"ema: {words}"):
            EMA(model, **wrong)


def mean(average: Tensor, model: Tensor, count: Tensor) -> Tensor:
    return average + (model - average) / (count + 1)


TORCH: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "equal average": ({"like": "torch"}, dict),
    "equal average, buffers too": ({"use_buffers": True}, lambda: {"use_buffers": True}),
    "moving average": (
        {"decay": 0.9, "use_buffers": False},
        lambda: {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    ),
    "moving average, buffers too": (
        {"decay": 0.9, "use_buffers": True},
        lambda: {"avg_fn": swa_utils.get_ema_avg_fn(0.9), "use_buffers": True},
    ),
    "its functions": (
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)},
        lambda: {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)},
    ),
    "its function for lists": (
        {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
        lambda: {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    ),
    "a function for tensors": (
        {"avg_fn": mean, "use_buffers": True},
        lambda: {"avg_fn": mean, "use_buffers": True},
    ),
}


class FloatModel(Model):
    """Without integer buffers: with use_buffers torch averages those too, into what their dtype holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, track_running_stats=False)


@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str) -> None:
    given, theirs_take = TORCH[name]
    model = FloatModel() if "buffers" in name or "tensors" in name else Model()
    ours, theirs = EMA(model, **given), AveragedModel(model, **theirs_take())
    for step in range(1, 7):
        move(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert_same_state(ours, theirs)
        assert ours.n_averaged == theirs.n_averaged == step


def test_torch_state_round_trip() -> None:
    model = Model()
    ours, theirs = (
        EMA(model, 0.9, like="torch"),
        AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
    )
    for step in range(3):
        move(model, step)
        ours.update_parameters(model)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.n_averaged == 3
    move(model, 9)
    ours.update_parameters(model)
    theirs.update_parameters(model)
    assert_same_state(ours, theirs)
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs) or ours.n_averaged == 4


def test_batch_norm_statistics_are_made_anew_as_for_averaged_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours = EMA(model, like="torch")
    ours.update_parameters(model)
    data = [torch.randn(16, 3) + 5 for _ in range(4)]
    swa_utils.update_bn(data, ours)
    assert (ours.module[1].running_mean - ours.module[0](torch.cat(data)).mean(0)).abs().max() < 1e-4


def test_without_their_arguments_it_is_data2vecs() -> None:
    model = Model()
    ema = EMA(model, 0.5)
    before = {name: x.clone() for name, x in ema.module.state_dict().items()}
    move(model, 1)
    ema.update(model)
    state = model.state_dict()
    assert torch.equal(ema.module.scale, state["scale"]) and torch.equal(
        ema.module.positions, state["positions"]
    )
    halfway = (before["linear.weight"] + state["linear.weight"]) / 2
    torch.testing.assert_close(ema.module.linear.weight, halfway)
    assert EMA(model).get_decay() == 0.9998 and EMA(model, 0.5, end_decay=1.0, anneal=10).get_decay(5) == 0.75


def test_device_and_what_wraps_a_model() -> None:
    model = Model()
    on_meta = EMA(model, 0.9, device="meta")
    assert all(x.is_meta for x in on_meta.module.state_dict().values())
    compiled = torch.compile(model, backend="eager")
    ema, plain = EMA(compiled, 0.5), EMA(model, 0.5)
    assert ema.state_dict().keys() == plain.state_dict().keys()
    move(model, 1)
    ema.update(compiled)
    plain.update(model)
    assert_same_state(ema, plain)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"use_warmup": True, "use_buffers": True}, "must be arguments of one kind of average"),
        ({"like": "torch", "min_decay": 0.1}, "min_decay must be arguments of torch"),
        ({"like": "timm", "avg_fn": mean}, "avg_fn must be arguments of timm"),
        ({"like": "swa"}, "like must be one of 'data2vec', 'timm', 'torch', got 'swa'"),
        (
            {"like": "timm", "end_decay": 0.9},
            "end_decay and anneal must be left out of an average like timm's",
        ),
        (
            {"use_buffers": True, "anneal": 3},
            "end_decay and anneal must be left out of an average like torch's",
        ),
        ({"min_decay": 2.0}, "min_decay must be >= 0.0 and <= 1.0, got 2.0"),
        ({"warmup_gamma": 0.0}, "warmup_gamma must be > 0, got 0.0"),
        ({"decay": 0.9, "avg_fn": mean}, "only one of decay, avg_fn and multi_avg_fn may be given"),
        ({"like": "torch", "decay": 1.5}, "decay must be >= 0.0 and <= 1.0, got 1.5"),
    ],
)
def test_refusals(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"ema: .*{words}"):
        EMA(nn.Linear(2, 2), **given)
