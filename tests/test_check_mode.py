"""D2VKERN_CHECK: wrong backends are caught, forward, backward and in place; right ones are left alone."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import d2vkern
from d2vkern import _backend, _check_mode, _native
from d2vkern._backend import Implementation
from d2vkern._check_mode import BackendMismatch, force_checks, requested
from d2vkern.reference import ema, loss, masks, residual_norm, targets

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def checks_on() -> Iterator[None]:
    with force_checks(True):
        yield


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Install:
    """`native(stem, name=function, ...)` makes these functions the stem's backend "native"."""

    def install(stem: str, **functions: Callable[..., Any]) -> None:
        module = types.ModuleType(f"fake_native_{stem}")
        for name, function in functions.items():
            setattr(module, name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        table = {**_backend.REGISTRY[stem], "native": Implementation(module.__name__)}
        monkeypatch.setitem(_backend.REGISTRY, stem, table)
        monkeypatch.setattr(_native, "problem", lambda: "")

    return install


class _ScaledGradient(torch.autograd.Function):
    """The identity with a gradient that is a little off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx * 1.001


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, update = (torch.randn(3, 7, 16).to(dtype).requires_grad_() for _ in range(2))
    return x, update, torch.randn(16).requires_grad_()


def _norm(x: Tensor, update: Tensor, weight: Tensor, **settings: Any) -> Tensor:
    return d2vkern.residual_norm(x, update, weight, backend="native", **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_backend_is_left_alone(native: Install, dtype: torch.dtype) -> None:
    native("residual_norm", residual_norm=residual_norm.residual_norm)
    inputs = _inputs(dtype)
    out = _norm(*inputs)
    checked = torch.autograd.grad(out, inputs, torch.ones_like(out))
    with force_checks(False):
        plain = _norm(*inputs)
        unchecked = torch.autograd.grad(plain, inputs, torch.ones_like(plain))
    assert torch.equal(out, plain)
    assert all(torch.equal(*pair) for pair in zip(checked, unchecked, strict=True))


def test_wrong_forward_names_op_backend_output_error_and_tolerance(native: Install) -> None:
    native("residual_norm", residual_norm=lambda *args: residual_norm.residual_norm(*args) * 1.01)
    words = (
        r"residual_norm: residual_norm on backend native, output 0: largest error [\d.e-]+, "
        r"tolerance [\d.e-]+; shape \(3, 7, 16\), torch.float32"
    )
    with pytest.raises(BackendMismatch, match=words):
        _norm(*_inputs())


def test_a_difference_within_low_precision_is_none(native: Install) -> None:
    native("residual_norm", residual_norm=lambda *args: residual_norm.residual_norm(*args) * (1 + 1e-4))
    _norm(*_inputs(torch.bfloat16))
    with pytest.raises(BackendMismatch, match="output 0"):
        _norm(*_inputs(torch.float32))


def test_wrong_gradient_is_found_in_backward_and_named(native: Install) -> None:
    def wrong(x: Tensor, update: Tensor, *rest: Any) -> Tensor:
        return residual_norm.residual_norm(x, _ScaledGradient.apply(update), *rest)

    native("residual_norm", residual_norm=wrong)
    x, update, weight = _inputs()
    out = _norm(x, update, weight)
    with pytest.raises(BackendMismatch, match="on backend native, gradient of update: .* tolerance"):
        out.square().sum().backward()
    assert _norm(x, update.detach(), weight).square().sum().backward() is None


def test_gradient_of_one_call_is_told_from_other_uses(native: Install) -> None:
    native("residual_norm", residual_norm=residual_norm.residual_norm)
    x, update, weight = _inputs()
    (_norm(x, update, weight) * x + _norm(x, x, weight) + update).sum().backward()
    assert x.grad is not None and update.grad is not None


def test_missing_gradients_are_found(native: Install) -> None:
    native("residual_norm", residual_norm=lambda *args: residual_norm.residual_norm(*args).detach())
    with pytest.raises(BackendMismatch, match="output 0: has no gradient, eager's has a gradient"):
        _norm(*_inputs())
    with torch.no_grad():
        _norm(*_inputs())

    def constant_update(x: Tensor, update: Tensor, *rest: Any) -> Tensor:
        return residual_norm.residual_norm(x, update.detach(), *rest)

    native("residual_norm", residual_norm=constant_update)
    with pytest.raises(BackendMismatch, match="gradient of update"):
        _norm(*_inputs()).square().sum().backward()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda out: out[:2],
            r"output 0: is torch.float32 \(2, 7, 16\), eager's is torch.float32 \(3, 7, 16\)",
        ),
        (lambda out: out.half(), "output 0: is torch.float16"),
        (
            lambda out: out.where(out != out.max(), torch.nan),
            "differs from eager where values are not finite",
        ),
        (lambda out: out.where(out != out.max(), torch.inf), "largest error inf"),
    ],
    ids=["shape", "dtype", "nan", "inf"],
)
def test_other_faults(native: Install, change: Callable[[Tensor], Tensor], words: str) -> None:
    native("residual_norm", residual_norm=lambda *args: change(residual_norm.residual_norm(*args)))
    with pytest.raises(BackendMismatch, match=words):
        _norm(*_inputs())


def test_one_wrong_integer_is_enough(native: Install) -> None:
    def off_by_one(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        mask, keep, slot = masks.random_mask(*args, **kwargs)
        slot[2, 3] += 1
        return mask, keep, slot

    native("masks", random_mask=off_by_one)
    with pytest.raises(
        BackendMismatch, match="masks: random_mask on backend native, output 2: 1 values differ"
    ):
        d2vkern.random_mask(torch.arange(2), 3, 9, prob=0.5, backend="native")


@pytest.mark.parametrize("victim", ["teacher", "copies"])
def test_wrong_in_place_results_are_found(native: Install, victim: str) -> None:
    def wrong(teacher: list[Tensor], student: list[Tensor], decay: float, copies: list[Tensor]) -> None:
        ema.ema_update_(teacher, student, decay, copies)
        {"teacher": teacher, "copies": copies}[victim][1].view(-1)[0] += 0.5

    native("ema", ema_update_=wrong)
    teacher, student = ([torch.randn(n) for n in (3, 5)] for _ in range(2))
    copies = [torch.empty(n, dtype=torch.bfloat16) for n in (3, 5)]
    with pytest.raises(BackendMismatch, match=rf"ema: ema_update_ on backend native, output {victim}\[1\]"):
        d2vkern.ema_update_(teacher, student, 0.9, copies, backend="native")


def test_in_place_ops_change_their_arguments_once(native: Install) -> None:
    native("ema", ema_update_=ema.ema_update_)
    native("targets", accumulate=targets.accumulate, finish=targets.finish)
    teacher, student = torch.ones(4), torch.zeros(4)
    d2vkern.ema_update_([teacher], [student], 0.5, backend="native")
    assert torch.equal(teacher, torch.full((4,), 0.5))
    layers = [torch.randn(2, 5, 8) for _ in range(3)]
    assert torch.equal(
        d2vkern.layer_targets(layers, "instance", "layer", backend="native"),
        d2vkern.layer_targets(layers, "instance", "layer"),
    )


def test_optimizer_step_is_checked(native: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2vkern.reference import adamw_ema

    def scaled_grads(params: Any, grads: list[Tensor], *rest: Any, **settings: Any) -> None:
        adamw_ema.adamw_ema_(params, grads, *rest, **settings)
        grads[0].mul_(3)  # allowed: what stays in .grad is a backend's own business

    def wrong(params: Any, grads: Any, exp_avgs: list[Tensor], *rest: Any, **settings: Any) -> None:
        adamw_ema.adamw_ema_(params, grads, exp_avgs, *rest, **settings)
        exp_avgs[0].mul_(1.01)

    weight = torch.nn.Parameter(torch.randn(4, 3))
    weight.grad = torch.randn(4, 3)
    optimizer = d2vkern.AdamWEMA([weight], teacher=[weight.detach().clone()], backend="native")
    native("adamw_ema", adamw_ema_=scaled_grads)
    optimizer.step(ema_decay=0.9, clip_factor=0.5)
    native("adamw_ema", adamw_ema_=wrong)
    with pytest.raises(BackendMismatch, match=r"adamw_ema: adamw_ema_ .*output exp_avgs\[0\]"):
        optimizer.step(ema_decay=0.9)


def test_dropout_without_a_seed_gets_one(native: Install) -> None:
    seeds = []

    def remember(*args: Any) -> Tensor:
        seeds.append(inspect.signature(residual_norm.residual_norm).bind(*args).arguments["seed"])
        return residual_norm.residual_norm(*args)

    native("residual_norm", residual_norm=remember)
    for _ in range(2):
        _norm(*_inputs(), dropout_p=0.5).sum().backward()
    torch.manual_seed(5)
    _norm(*_inputs(), dropout_p=0.5, drop_path_p=0.5, seed=3)
    _norm(*_inputs(), drop_path_p=0.5)
    assert len(set(seeds)) == 4 and seeds[2] == 3 and all(isinstance(seed, int) for seed in seeds)


def test_calls_that_draw_otherwise_are_not_compared_and_logged(
    native: Install, caplog: pytest.LogCaptureFixture
) -> None:
    native("residual_norm", residual_norm=lambda x, *rest: x * torch.rand(()))
    with caplog.at_level(logging.WARNING, logger="d2vkern"):
        _norm(*_inputs()).sum().backward()
    assert [record.getMessage() for record in caplog.records] == [
        "residual_norm: residual_norm on backend native drew from torch's generators "
        "and was not compared with eager"
    ]


def test_generators_are_left_as_without_checks(native: Install) -> None:
    native("masks", random_mask=masks.random_mask)
    state = torch.get_rng_state()
    d2vkern.random_mask(torch.arange(2), 3, 9, prob=0.5, backend="native")
    assert torch.equal(torch.get_rng_state(), state)


def test_several_outputs_of_which_one_has_a_gradient(native: Install) -> None:
    plan = d2vkern.random_mask(torch.arange(2), 3, 9, prob=0.5)
    pred, target = torch.randn(6, 9, 8, requires_grad=True), torch.randn(2, 9, 8)
    native("loss", masked_regression_loss=loss.masked_regression_loss)
    out = d2vkern.masked_regression_loss(pred, target, plan, backend="native")
    out.loss.backward(retain_graph=True)
    first = pred.grad.clone()
    out.loss.backward()
    torch.testing.assert_close(pred.grad, 2 * first)
    native(
        "loss", masked_regression_loss=lambda *args: (*loss.masked_regression_loss(*args)[:2], args[1].sum())
    )
    with pytest.raises(BackendMismatch, match="loss: .* output 2: largest error"):
        d2vkern.masked_regression_loss(pred, target, plan, backend="native")


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(native: Install, reentrant: bool) -> None:
    def wrong(x: Tensor, update: Tensor, *rest: Any) -> Tensor:
        return residual_norm.residual_norm(_ScaledGradient.apply(x), update, *rest)

    x, update, weight = _inputs()
    native("residual_norm", residual_norm=residual_norm.residual_norm)
    checkpoint(_norm, x, update, weight, use_reentrant=reentrant).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    native("residual_norm", residual_norm=wrong)
    out = checkpoint(_norm, x, update, weight, use_reentrant=reentrant)
    with pytest.raises(BackendMismatch, match="gradient of x"):
        out.square().sum().backward()


def test_outputs_may_be_changed_in_place_and_gradients_asked_for_singly(native: Install) -> None:
    native("residual_norm", residual_norm=residual_norm.residual_norm)
    x, update, weight = _inputs()
    out = _norm(x, update, weight)
    (only,) = torch.autograd.grad(out.mul_(2).sum(), [update])
    assert only.shape == update.shape


def test_under_autocast(native: Install) -> None:
    native("residual_norm", residual_norm=residual_norm.residual_norm)
    x, update, weight = _inputs(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = _norm(x, update, weight)
    out.float().square().sum().backward()
    assert weight.grad is not None


def test_nothing_is_kept_alive(native: Install) -> None:
    import gc
    import weakref

    native("residual_norm", residual_norm=residual_norm.residual_norm)
    gc.collect()
    gc.disable()
    try:
        inputs = _inputs()
        out = _norm(*inputs)
        out.sum().backward()
        gone = [weakref.ref(tensor) for tensor in (*inputs, out)]
        del inputs, out
        assert [ref() is None for ref in gone] == [True] * 4
    finally:
        gc.enable()


def test_empty_tensors(native: Install) -> None:
    native("residual_norm", residual_norm=residual_norm.residual_norm)
    x = torch.randn(0, 16, requires_grad=True)
    _norm(x, torch.randn(0, 16), torch.ones(16)).sum().backward()


def test_off_is_the_backend_itself(native: Install) -> None:
    native("residual_norm", residual_norm=residual_norm.residual_norm)
    fake = sys.modules["fake_native_residual_norm"]
    assert _backend.select("residual_norm", "native", torch.zeros(1)) is not fake
    with force_checks(False):
        assert _backend.select("residual_norm", "native", torch.zeros(1)) is fake
    assert _backend.select("residual_norm", "eager", torch.zeros(1)) is residual_norm


def test_off_under_compile(native: Install) -> None:
    native("residual_norm", residual_norm=lambda x, *rest: x + 1)
    x = torch.randn(2, 4)
    compiled = torch.compile(
        lambda x: d2vkern.residual_norm(x, x, backend="native"), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(x), x + 1)
    torch._dynamo.reset()


def test_a_right_triton_backend(triton_device: torch.device) -> None:
    layers = [torch.randn(2, 13, 24, device=triton_device) for _ in range(2)]
    d2vkern.layer_targets(layers, "instance", "layer", backend="triton")
    plan = d2vkern.random_mask(torch.arange(2, device=triton_device), 3, 13, prob=0.5, backend="triton")
    pred = torch.randn(6, 13, 24, device=triton_device, requires_grad=True)
    out = d2vkern.masked_regression_loss(pred, layers[0], plan, beta=0.5, backend="triton")
    out.loss.backward()
    assert pred.grad is not None


def test_environment() -> None:
    assert not requested({}) and not requested({"D2VKERN_CHECK": "0"}) and requested({"D2VKERN_CHECK": "1"})
    with pytest.raises(ValueError, match="environment D2VKERN_CHECK: must be 0 or 1, got 'yes'"):
        requested({"D2VKERN_CHECK": "yes"})


def test_environment_switches_it_on() -> None:
    program = "import d2vkern; from d2vkern import _check_mode; print(_check_mode.enabled)"
    for value in ("1", "0"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            check=True, capture_output=True, text=True, env={"D2VKERN_CHECK": value, "PATH": ""},
        )  # fmt: skip
        assert run.stdout.strip() == str(value == "1")
    assert not _check_mode.requested({})
