"""Every op that a Triton backend registers with torch.library, through the public functions that call it.

The cases are those of test_library.py, on the Triton backend (on a CPU in the interpreter): under
torch.compile(fullgraph=True) they give the values, gradients and profiler ranges of uncompiled, eager agrees
with them (D2VKERN_CHECK), and every registered op passes opcheck with the arguments it got here. An op that
no case reaches fails the last test; FURTHER has calls that reach what the others do not.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

pytest.importorskip("triton")

import d2vkern  # noqa: E402
from d2vkern._backend import REGISTRY  # noqa: E402
from d2vkern._check_mode import force_checks  # noqa: E402
from d2vkern._nvtx import force_ranges  # noqa: E402
from d2vkern.testing import backend_spy  # noqa: E402

from .test_library import CASES, DIFFERENTIABLE, SIZES, Case, _parts, _plan, _rand  # noqa: E402

STEMS = [stem for stem in REGISTRY if "triton" in REGISTRY[stem]]
for _stem in STEMS:
    importlib.import_module(REGISTRY[_stem]["triton"].module)
NAMESPACE = "d2vkern::"
REGISTERED = sorted(
    name.removeprefix(NAMESPACE)
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(NAMESPACE) and "onednn" not in name
)
Run = Callable[..., tuple[Tensor, ...]]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def _ema_update(teacher: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    averaged, copy = teacher.clone(), torch.zeros_like(teacher, dtype=torch.float16)
    d2vkern.ema_update_([averaged], [student], 0.9, [copy])
    return averaged, copy


def _adamw_ema(weight: Tensor, gradient: Tensor, wrap: Wrap = lambda step: step) -> tuple[Tensor, ...]:
    weight, teacher = weight.clone(), weight.clone()
    weight.grad = gradient
    optimizer = d2vkern.AdamWEMA([weight], lr=0.1, teacher=[teacher], capturable=True)
    step = wrap(optimizer.step)
    for _ in range(2):
        step(ema_decay=0.9)
    return weight, teacher


def _loss_kept(mask: Tensor, keep: Tensor, slot: Tensor, pred: Tensor) -> tuple[Tensor, ...]:
    """A graph that is kept may not scale its gradient in place."""
    plan = d2vkern.MaskPlan(mask, keep, slot, 3)
    out = d2vkern.masked_regression_loss(pred, pred.detach()[:2] + 1, plan)
    (first,) = torch.autograd.grad(out.loss, pred, retain_graph=True)
    return (first,)


# In the place of test_library.py's cases that the interpreter cannot do (bf16) or does slowly (many rows).
INSTEAD = {
    "ema_update_": Case("ema", _ema_update, lambda t: (torch.randn(t), torch.randn(t).half())),
    "inverse_block_mask": replace(CASES["inverse_block_mask"], inputs=lambda t: (torch.arange(2),)),
    "span_mask": replace(CASES["span_mask"], inputs=lambda t: (torch.arange(2),)),
    "random_mask": replace(CASES["random_mask"], inputs=lambda t: (torch.arange(2),)),
    "scatter_tokens": replace(
        CASES["scatter_tokens"], inputs=lambda t: CASES["scatter_tokens"].inputs(SIZES[0] // 2)
    ),
    "AdamWEMA": Case("adamw_ema", _adamw_ema, lambda t: (torch.randn(t), torch.randn(t))),
}
WITHOUT = ("MaskPlan", "grad_norm", "linear")
"""no kernel of ours: a plan is indexing, PyTorch's norm is a launch or a few, and its product is one"""
ALL = {name: case for name, case in (CASES | INSTEAD).items() if case.stem in STEMS and name not in WITHOUT}
FURTHER = {
    "loss, graph kept": Case("loss", _loss_kept, lambda t: (*_parts(_plan(t)), _rand(6, t, 8))),
    "scatter_tokens, a token": Case(
        "gather",
        lambda mask, keep, slot, x, token: (
            d2vkern.scatter_tokens(x, d2vkern.MaskPlan(mask, keep, slot, 3), mask_token=token),
        ),
        lambda t: (*_parts(_plan(t // 2)), _rand(6, _plan(t // 2).kept + 1, 8), _rand(8)),
    ),
}
"""calls that reach registered ops which the others do not"""


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    torch._dynamo.reset()
    with d2vkern.use_backend(**dict.fromkeys(STEMS, "triton")):
        yield
    torch._dynamo.reset()


class Samples(TorchDispatchMode):
    """Arguments of the registered ops that run in the block, as they were before."""

    def __init__(self) -> None:
        super().__init__()
        self.found: defaultdict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "d2vkern":
            copies = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
            self.found[func._schema.name.removeprefix(NAMESPACE)].append(copies)
        return func(*args, **(kwargs or {}))


def _inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The same at every call."""
    torch.manual_seed(0)
    with d2vkern.use_backend("eager"):  # plans are made on the CPU
        inputs = case.inputs(SIZES[0])
    return tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs)


def _values_and_gradients(run: Run, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = run(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    if not outputs[0].requires_grad or not wanted:
        return [out.detach() for out in outputs]
    weights = torch.linspace(-1, 1, outputs[0].numel(), device=outputs[0].device).view_as(outputs[0])
    gradients = torch.autograd.grad(outputs[0], wanted, weights, allow_unused=True, materialize_grads=True)
    return [*(out.detach() for out in outputs), *gradients]


def _ranges(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[str]]:
    """What `run` returns, and the Triton ranges that torch.profiler saw, in order."""
    with force_ranges(None), profile(activities=[ProfilerActivity.CPU]) as profiler:
        values = run()
    names = [event.name for event in profiler.events() if event.name.startswith("d2vkern/")]
    return values, [name for name in names if name.endswith("/triton")]


@pytest.mark.parametrize("name", ALL)
def test_compiled_equals_uncompiled_which_eager_confirms(name: str, triton_device: torch.device) -> None:
    case = ALL[name]
    with backend_spy() as calls, force_checks(True):
        expected, plain = _ranges(lambda: _values_and_gradients(case.run, _inputs(case, triton_device)))
    assert set(calls) >= {(case.stem, "triton")}
    wrap = partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled = partial(_adamw_ema, wrap=wrap) if name == "AdamWEMA" else wrap(case.run)
    actual, ranges = _ranges(lambda: _values_and_gradients(compiled, _inputs(case, triton_device)))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    directions = {name.split("/")[2] for name in ranges}
    assert directions == ({"fwd", "bwd"} if name in DIFFERENTIABLE else {"fwd"})
    assert sorted(ranges) == sorted(plain)


@pytest.fixture(scope="module")
def samples(triton_device: torch.device) -> dict[str, list[tuple[Any, ...]]]:
    with d2vkern.use_backend(**dict.fromkeys(STEMS, "triton")), Samples() as mode:
        for case in (*ALL.values(), *FURTHER.values()):
            _values_and_gradients(case.run, _inputs(case, triton_device))
    return dict(mode.found)


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name: str, samples: dict[str, list[tuple[Any, ...]]]) -> None:
    if name not in samples:
        pytest.fail(f"no case calls d2vkern::{name}: add one to FURTHER")
    operator = getattr(torch.ops.d2vkern, name).default
    torch.library.opcheck(operator, samples[name][0])


def test_every_triton_op_registers_something_and_has_a_case() -> None:
    assert {case.stem for case in ALL.values()} == set(STEMS)
    assert len(REGISTERED) >= len(STEMS)


def test_cpu_tensors_are_started_beside_a_gpu_and_a_triton_without_fences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's compute capability is asked of GPUs alone: interpreted kernels run beside one, too."""
    from d2vkern.kernels import _launch

    seen: list[dict[str, Any]] = []
    kernel = {(1,): lambda *args, **options: seen.append(options)}
    monkeypatch.setattr(_launch, "_hazard", lambda: "a hazard")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _launch.launch(kernel, (1,), torch.ones(2), num_stages=3)
    assert [options["num_stages"] for options in seen] == [3]
