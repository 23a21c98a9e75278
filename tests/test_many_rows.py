"""Gradients that many rows, blocks or taps add to are summed in fp32: 16 bits lose a few roundings only."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import d2vkern
from d2v.model.blocks import layer_norm
from d2vkern import _native
from d2vkern.ops.mlp import linear

Op = Callable[..., Tensor]
ROWS = 3000


def _conv_stem(kernel: int, stride: int) -> Op:
    return lambda x, w, nw, nb, **given: d2vkern.conv_stem(x, w, stride, nw, nb, **given)


def _rows_of(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    kept = torch.rand(x.shape[0], x.shape[1], generator=generator).argsort(1)[:, : x.shape[1] // 2]
    return kept.sort(1).values


def _in_rows(x: Tensor, w: Tensor, b: Tensor, **given: Any) -> Tensor:
    return d2vkern.conv_block_1d(x, w, b, groups=2, residual=True, rows=_rows_of(x), **given)


def _plan(samples: int, tokens: int) -> d2vkern.MaskPlan:
    return d2vkern.random_mask(torch.arange(samples), 16, tokens, prob=0.5)


def _masked(x: Tensor, w: Tensor, b: Tensor, **given: Any) -> Tensor:
    return d2vkern.conv_block_1d(x, w, b, groups=2, plan=_plan(*x.shape[:2]), **given)


def _gather(x: Tensor, extra: Tensor, positions: Tensor, **given: Any) -> Tensor:
    return d2vkern.gather_tokens(x, _plan(*x.shape[:2]), extra, positions, **given)


def _residual_norm(x: Tensor, update: Tensor, w: Tensor, b: Tensor, ub: Tensor, **given: Any) -> Tensor:
    return d2vkern.residual_norm(x, update, w, b, update_bias=ub, **given)


def _layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    layer = nn.LayerNorm(x.shape[-1]).to(x.dtype)
    del layer.weight, layer.bias
    layer.weight, layer.bias = w, b
    return layer_norm(x, layer)


# Stem (None: no op but the trainer's), function, shapes of its inputs, and how many last digits of its dtype
# a value or gradient may be off: what is rounded on the way counts, what is summed in 16 bits exceeds it.
CASES: dict[str, tuple[str | None, Op, list[tuple[int, ...]], float]] = {
    "stem, kernel 3": ("conv_stem", _conv_stem(3, 2), [(60, 101, 32), (24, 32, 3), (24,), (24,)], 0.6),
    "stem, waveform": ("conv_stem", _conv_stem(10, 5), [(60, 251, 1), (24, 1, 10), (24,), (24,)], 0.6),
    "stem, many taps": ("conv_stem", _conv_stem(9, 1), [(60, 50, 32), (24, 32, 9), (24,), (24,)], 0.6),
    "block": ("conv_block", d2vkern.conv_block_1d, [(30, 100, 16), (16, 16, 5), (16,)], 1.35),
    "block, places": ("conv_block", _in_rows, [(30, 100, 16), (16, 8, 19), (16,)], 1.35),
    "block, plan": ("conv_block", _masked, [(4, 100, 16), (16, 8, 19), (16,)], 0.75),
    "block, grid": ("conv_block", d2vkern.conv_block_2d, [(20, 14, 14, 16), (16, 16, 3, 3), (16,)], 1.4),
    "gather": ("gather", _gather, [(60, 50, 16), (1, 16), (50, 16)], 0.55),
    "norm": ("residual_norm", _residual_norm, [(ROWS, 16), (ROWS, 16), (16,), (16,), (16,)], 0.55),
    "mlp": ("mlp", d2vkern.gelu_mlp, [(ROWS, 16), (32, 16), (32,), (16, 32), (16,)], 0.55),
    "linear": ("mlp", linear, [(ROWS, 16), (32, 16), (32,)], 0.55),
    "layer norm of the trainer": (None, _layer, [(ROWS, 16), (16,), (16,)], 0.55),
}


def _gradients(function: Op, inputs: list[Tensor], dtype: torch.dtype, **given: str) -> list[Tensor]:
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs, **given)
    # mostly of one sign: a sum in 16 bits stands still where a further row is below its last digit
    dout = torch.linspace(0, 7, out.numel(), dtype=torch.float64).cos().add(0.5).bfloat16().view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, dout.to(dtype))]


@pytest.mark.parametrize(("name", "backend"), [*((name, "eager") for name in CASES), ("gather", "native")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_many_rows(name: str, dtype: torch.dtype, backend: str) -> None:
    stem, function, shapes, limit = CASES[name]
    if backend == "native" and (problem := _native.problem()):
        pytest.skip(problem)
    scale = [1.0, *(torch.tensor(shape[1:]).prod().item() ** -0.5 for shape in shapes[1:])]
    inputs = [(torch.randn(shape) * s).to(dtype) for shape, s in zip(shapes, scale, strict=True)]
    given = {} if stem is None else {"backend": backend}
    low = _gradients(function, inputs, dtype, **given)
    exact = _gradients(function, inputs, torch.float64, **({} if stem is None else {"backend": "eager"}))
    for actual, expected in zip(low, exact, strict=True):
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < limit * torch.finfo(dtype).eps, (error, tuple(expected.shape))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("block")])
def test_sums_where_onednn_has_no_16_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    test_sums_of_many_rows(name, torch.bfloat16, "eager")
