"""Every op under torch.compile(fullgraph=True): the values and gradients of uncompiled, static and dynamic.

A new op adds a row to CASES; the last test fails while one is missing. The eager backend is not registered
with torch.library (it stays traceable), so there is no opcheck here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import d2vkern
from d2vkern._backend import STEMS
from d2vkern.testing import backend_spy

SIZES = (13, 18)


@dataclass(frozen=True)
class Case:
    """One public name: `run(*inputs)` returns tensors; `inputs(size)` makes fresh ones."""

    stem: str
    run: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[[int], tuple[Tensor, ...]]


def _rand(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _plan(tokens: int) -> d2vkern.MaskPlan:
    """2 samples, 3 clones. At SIZES[0] no two sizes coincide: Dynamo would take equal ones for the same."""
    return d2vkern.random_mask(torch.arange(2), 3, tokens, prob=0.25)


def _parts(plan: d2vkern.MaskPlan) -> tuple[Tensor, Tensor, Tensor]:
    return plan.mask, plan.ids_keep, plan.slot


def _streamed_targets(*layers: Tensor) -> tuple[Tensor, ...]:
    targets = d2vkern.LayerTargets("layer")
    for layer in layers:
        targets.add(layer)
    return (targets.result(),)


def _ema_update(teacher: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    averaged, copy = teacher.clone(), torch.zeros_like(teacher, dtype=torch.bfloat16)
    d2vkern.ema_update_([averaged], [student], 0.9, [copy])
    return averaged, copy


CASES = {
    "MaskPlan": Case(
        "masks",
        lambda mask, keep, slot: _parts(d2vkern.MaskPlan(mask, keep, slot, 3).to("cpu")),
        lambda t: _parts(_plan(t)),
    ),
    "inverse_block_mask": Case(
        "masks",
        lambda ids: _parts(d2vkern.inverse_block_mask(ids, 3, (6, 5), prob=0.8, length=3, seed=1)),
        lambda t: (torch.arange(t),),
    ),
    "span_mask": Case(
        "masks",
        lambda ids: _parts(d2vkern.span_mask(ids, 3, 40, prob=0.5, length=5, seed=1)),
        lambda t: (torch.arange(t),),
    ),
    "random_mask": Case(
        "masks",
        lambda ids: _parts(d2vkern.random_mask(ids, 3, 40, prob=0.4, seed=1)),
        lambda t: (torch.arange(t),),
    ),
    "gather_tokens": Case(
        "gather",
        lambda mask, keep, slot, x, extra, positions, per_mask: (
            d2vkern.gather_tokens(x, d2vkern.MaskPlan(mask, keep, slot, 3), extra, positions, per_mask),
        ),
        lambda t: (*_parts(_plan(t)), _rand(2, t, 8), _rand(1, 8), _rand(t, 8), _rand(6, t, 8)),
    ),
    "scatter_tokens": Case(
        "gather",
        lambda mask, keep, slot, x: (
            d2vkern.scatter_tokens(x, d2vkern.MaskPlan(mask, keep, slot, 3), 0.1, 7),
        ),
        lambda t: (*_parts(_plan(t)), _rand(6, _plan(t).kept + 1, 8)),
    ),
    "multimask_attention": Case(
        "attention",
        lambda qkv, positions, slopes, scale: (
            d2vkern.multimask_attention(qkv, positions=positions, slopes=slopes.detach(), alibi_scale=scale),
        ),
        lambda t: (_rand(4, t, 3, 2, 8), torch.arange(t).expand(4, t).contiguous(), _rand(2), _rand(2)),
    ),
    "conv_block_1d": Case(
        "conv_block",
        lambda x, weight, bias: (d2vkern.conv_block_1d(x, weight, bias, groups=2, residual=True),),
        lambda t: (_rand(2, t, 8), _rand(8, 4, 3), _rand(8)),
    ),
    "conv_block_2d": Case(
        "conv_block",
        lambda x, weight: (d2vkern.conv_block_2d(x, weight, groups=2),),
        lambda t: (_rand(2, t, 5, 8), _rand(8, 4, 3, 3)),
    ),
    "conv_stem": Case(
        "conv_stem",
        lambda x, weight, scale, shift: (d2vkern.conv_stem(x, weight, 2, scale, shift),),
        lambda t: (_rand(2, t, 4), _rand(8, 4, 3), _rand(8), _rand(8)),
    ),
    "residual_norm": Case(
        "residual_norm",
        lambda x, update, weight, bias: (d2vkern.residual_norm(x, update, weight, bias),),
        lambda t: (_rand(2, t, 8), _rand(2, t, 8), _rand(8), _rand(8)),
    ),
    "gelu_mlp": Case(
        "mlp",
        lambda x, w1, b1, w2, b2: (d2vkern.gelu_mlp(x, w1, b1, w2, b2),),
        lambda t: (_rand(2, t, 8), _rand(16, 8), _rand(16), _rand(8, 16), _rand(8)),
    ),
    "linear": Case(
        "mlp",
        lambda x, weight, bias: (d2vkern.linear(x, weight, bias),),
        lambda t: (_rand(2, t, 8), _rand(16, 8), _rand(16)),
    ),
    "layer_targets": Case(
        "targets",
        lambda *layers: (d2vkern.layer_targets(layers, "instance", "layer"),),
        lambda t: (torch.randn(2, t, 8), torch.randn(2, t, 8)),
    ),
    "LayerTargets": Case(
        "targets",
        _streamed_targets,
        lambda t: (torch.randn(2, t, 8), torch.randn(2, t, 8)),
    ),
    "masked_regression_loss": Case(
        "loss",
        lambda mask, keep, slot, pred, target: tuple(
            d2vkern.masked_regression_loss(
                pred, target.detach(), d2vkern.MaskPlan(mask, keep, slot, 3), beta=0.5
            )
        ),
        lambda t: (*_parts(_plan(t)), _rand(6, t, 8), torch.randn(2, t, 8)),
    ),
    "ema_update_": Case("ema", _ema_update, lambda t: (torch.randn(t), torch.randn(t, dtype=torch.bfloat16))),
    "grad_norm": Case(
        "adamw_ema",
        lambda *grads: (d2vkern.grad_norm(grads),),
        lambda t: (torch.randn(t, 3), torch.randn(t, dtype=torch.float16)),
    ),
}
# Objects that hold modules or optimizer state: compiled as a step below.
STATEFUL = {"EMA", "AdamWEMA"}
DIFFERENTIABLE = [
    "gather_tokens",
    "scatter_tokens",
    "multimask_attention",
    "conv_block_1d",
    "conv_block_2d",
    "conv_stem",
    "residual_norm",
    "gelu_mlp",
    "linear",
    "masked_regression_loss",
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with d2vkern.use_backend("eager"):
        yield
    torch._dynamo.reset()


def _values_and_gradients(run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = run(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not outputs[0].requires_grad:
        return list(outputs)
    weights = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
    gradients = torch.autograd.grad(outputs[0], wanted, weights, allow_unused=True, materialize_grads=True)
    return [*outputs, *gradients]


def _assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_fullgraph_equals_uncompiled(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(SIZES[0])
    expected = _values_and_gradients(case.run, inputs)
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager", dynamic=False)
    with backend_spy() as calls:
        actual = _values_and_gradients(compiled, inputs)
    _assert_same(actual, expected)
    assert set(calls) == ({(case.stem, "eager")} if name != "MaskPlan" else set())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_graph_serves_several_sizes(name: str) -> None:
    case = CASES[name]
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(case.run, fullgraph=True, backend=count, dynamic=True)
    for size in SIZES:
        inputs = case.inputs(size)
        _assert_same(_values_and_gradients(compiled, inputs), _values_and_gradients(case.run, inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", CASES)
def test_nothing_reads_uninitialised_memory(name: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    inputs = case.inputs(SIZES[0])
    expected = _values_and_gradients(case.run, inputs)
    request.getfixturevalue("poisoned_empty")
    _assert_same(_values_and_gradients(case.run, inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_compiled_under_autocast(name: str) -> None:
    """Dtypes and values of uncompiled, where tests/test_autocast.py holds them against torch's."""
    case = CASES[name]
    inputs = case.inputs(SIZES[0])
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = _values_and_gradients(case.run, inputs)
        actual = _values_and_gradients(compiled, inputs)
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_ema_module_update_compiles() -> None:
    student = torch.nn.Linear(4, 3)
    ours, theirs = d2vkern.EMA(student, 0.9), d2vkern.EMA(student, 0.9)
    with torch.no_grad():
        student.weight.add_(1.0)
    torch.compile(lambda: ours.update(student, 1), fullgraph=True, backend="aot_eager")()
    theirs.update(student, 1)
    torch.testing.assert_close(ours.module.weight, theirs.module.weight, rtol=0, atol=1e-7)
    assert not torch.equal(ours.module.weight, student.weight)


def test_adamw_ema_step_compiles() -> None:
    weights = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5, 3))
        teacher = weight.detach().clone()
        optimizer = d2vkern.AdamWEMA([weight], lr=0.1, teacher=[teacher], capturable=True)
        weight.grad = torch.randn(5, 3)
        step = wrap(optimizer.step)
        for _ in range(2):
            step(ema_decay=0.9)
        weights.append((weight.detach(), teacher))
    _assert_same(list(weights[1]), list(weights[0]))


def test_every_public_op_has_a_case() -> None:
    public = set(d2vkern.__all__) - {"BackendError", "LossOutput", "keep_backend", "use_backend"}
    assert public == set(CASES) | STATEFUL
    assert {case.stem for case in CASES.values()} == set(STEMS)
