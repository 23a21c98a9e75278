"""torch.export, ONNX, and what ops refuse: in one line that names the op, never with a wrong number."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import d2vkern
from d2vkern import _native

from .test_library import CASES as LIBRARY_CASES
from .test_library import DIFFERENTIABLE

W1, B1, W2, B2 = torch.randn(16, 8), torch.randn(16), torch.randn(8, 16), torch.randn(8)
TAPS, SQUARE = torch.randn(8, 4, 3), torch.randn(8, 4, 3, 3)


@dataclass(frozen=True)
class Case:
    """An op as a function of inputs that all begin with the batch."""

    run: Callable[..., Any]
    inputs: Callable[[int], tuple[Tensor, ...]]


def _parts(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    plan = d2vkern.random_mask(torch.arange(samples), 3, 13, prob=0.25, backend="eager")
    return plan.mask, plan.ids_keep, plan.slot


def _rows(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda samples: (torch.randn(samples, *shape),)


def _two(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda samples: (torch.randn(samples, *shape), torch.randn(samples, *shape))


def _positions(samples: int) -> Tensor:
    return torch.arange(13).expand(samples, 13).contiguous()


CASES = {
    "linear": Case(lambda x: d2vkern.linear(x, W1, B1), _rows(13, 8)),
    "gelu_mlp": Case(lambda x: d2vkern.gelu_mlp(x, W1, B1, W2, B2), _rows(13, 8)),
    "residual_norm": Case(lambda x, u: d2vkern.residual_norm(x, u, B2, B2, prenorm=True), _two(13, 8)),
    "conv_stem": Case(lambda x: d2vkern.conv_stem(x, TAPS, 2, B2, B2), _rows(13, 4)),
    "conv_block_1d": Case(lambda x: d2vkern.conv_block_1d(x, TAPS, B2, 2, residual=True), _rows(13, 8)),
    "conv_block_2d": Case(lambda x: d2vkern.conv_block_2d(x, SQUARE, B2, 2), _rows(13, 5, 8)),
    "multimask_attention": Case(
        lambda qkv, positions, lengths: d2vkern.multimask_attention(
            qkv, positions=positions, slopes=B2[:2].abs(), lengths=lengths
        ),
        lambda samples: (torch.randn(samples, 13, 3, 2, 8), _positions(samples), torch.full((samples,), 7)),
    ),
    "gather_tokens": Case(
        lambda mask, keep, slot, x: d2vkern.gather_tokens(x, d2vkern.MaskPlan(mask, keep, slot, 3)),
        lambda samples: (*_parts(samples), torch.randn(samples, 13, 8)),
    ),
    "scatter_tokens": Case(
        lambda mask, keep, slot, x: d2vkern.scatter_tokens(x, d2vkern.MaskPlan(mask, keep, slot, 3), 0.0, 7),
        lambda samples: (*_parts(samples), torch.randn(3 * samples, _parts(1)[1].shape[1], 8)),
    ),
    "masked_regression_loss": Case(
        lambda mask, keep, slot, pred, target: (
            d2vkern.masked_regression_loss(pred, target, d2vkern.MaskPlan(mask, keep, slot, 3)).loss
        ),
        lambda samples: (*_parts(samples), torch.randn(3 * samples, 13, 8), torch.randn(samples, 13, 8)),
    ),
    "layer_targets": Case(lambda x, y: d2vkern.layer_targets([x, y]), _two(13, 8)),
    "random_mask": Case(
        lambda ids: _fields(d2vkern.random_mask(ids, 3, 40, prob=0.5, seed=1)),
        lambda samples: (torch.arange(samples),),
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def _fields(plan: d2vkern.MaskPlan) -> tuple[Tensor, ...]:
    return plan.mask, plan.ids_keep, plan.slot


class Model(torch.nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


def _outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _exported(case: Case, **how: Any) -> torch.export.ExportedProgram:
    inputs = case.inputs(4)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    return torch.export.export(Model(case.run), inputs, dynamic_shapes=(dynamic,), **how)


@cases
def test_export_saves_and_serves_other_batches(name: str) -> None:
    """Of torch's operators alone, so that it is opened where d2vkern is not installed."""
    case = CASES[name]
    file = io.BytesIO()
    torch.export.save(_exported(case), file)
    file.seek(0)
    program = torch.export.load(file)
    assert not [str(node.target) for node in program.graph.nodes if "d2vkern" in str(node.target)]
    inputs = case.inputs(6)
    for ours, theirs in zip(_outputs(program.module()(*inputs)), _outputs(case.run(*inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["conv_stem", "gelu_mlp", "multimask_attention"])
def test_exported_weights_may_be_trained(name: str) -> None:
    case = LIBRARY_CASES[name]
    inputs = case.inputs(13)
    wanted = [x for x in inputs if x.requires_grad]
    program = torch.export.export(Model(case.run), inputs).module()
    ours, theirs = (
        torch.autograd.grad(run(*inputs)[0].square().sum(), wanted, allow_unused=True)
        for run in (program, case.run)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_first_call_may_be_an_export() -> None:
    """The extension is looked at then; the question is no part of the graph."""
    if _native.problem():
        pytest.skip(_native.problem())

    def run(x: Tensor) -> Tensor:
        _native.problem.cache_clear()  # as the first call of an op finds it
        return x + len(_native.problem())

    torch.export.save(torch.export.export(Model(run), (torch.randn(3),)), io.BytesIO())


@cases
@pytest.mark.filterwarnings("ignore")
def test_onnx(name: str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    case = CASES[name]
    inputs = case.inputs(4)
    program = torch.onnx.export(Model(case.run).eval(), inputs, dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = {n: x.numpy() for n, x in zip(names, inputs, strict=False)}
    for ours, theirs in zip(session.run(None, given), _outputs(case.run(*inputs)), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in LIBRARY_CASES if name != "MaskPlan"])
def test_graphs_that_would_be_wrong_are_refused(name: str) -> None:
    case = LIBRARY_CASES[name]
    inputs = tuple(x.detach() for x in case.inputs(13))
    with pytest.raises(NotImplementedError, match=f"^{case.stem}: .*torch.onnx.export.dynamo=True"):
        torch.jit.trace(case.run, inputs)
    with pytest.raises(NotImplementedError, match=f"^{case.stem}: .*torch.onnx.export.dynamo=True"):
        torch.onnx.export(Model(case.run), inputs, io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_are_refused(name: str) -> None:
    case = LIBRARY_CASES[name]
    inputs = case.inputs(13)
    place = next(i for i, x in enumerate(inputs) if x.requires_grad)

    def one(x: Tensor) -> Tensor:
        return case.run(*inputs[:place], x, *inputs[place + 1 :])[0]

    x = inputs[place]
    refused = pytest.raises(NotImplementedError, match=f"^{case.stem}: has no rule for torch.func")
    with refused:
        torch.func.vmap(one)(x.expand(2, *x.shape))
    with refused:
        torch.func.jvp(one, (x,), (x,))
    with refused:
        torch.func.grad(lambda x: one(x).sum())(x)
    with refused, forward_ad.dual_level():
        one(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("weighted", [False, True], ids=["constant", "weighted"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused_when_they_are_taken(name: str, weighted: bool) -> None:
    """A gradient that arrives as a constant is no reason to be silent."""
    case = LIBRARY_CASES[name]
    inputs = case.inputs(13)
    leaves = [x for x in inputs if x.requires_grad]
    with d2vkern.use_backend("eager"):
        out = case.run(*inputs)[0]
    total = out.square().sum() if weighted else out.sum()
    first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    penalty = sum(dx.square().sum() for dx in first if dx is not None)
    if case.stem == "gather":  # linear, and eager's backward made of torch's operators
        assert penalty.requires_grad == weighted
        return
    with pytest.raises(RuntimeError, match=f"^({name}|{case.stem}): has no second derivative"):
        torch.autograd.grad(penalty, leaves, allow_unused=True)
