"""The gate: no number for a variant whose results at that very shape are not right.

Integers, bools and the names in `Case.bitwise` must equal eager's bit for bit. Everything else, gradients
included, is held against plain PyTorch in fp64 (in fp32 for bf16 and fp16): at most twice the
root-mean-square error and four times the largest error of plain PyTorch in the same dtype, plus four
roundings. Four, because the largest errors of two equally good orders of summation differ by more than two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import (
    Call,
    Case,
    Settings,
    backward,
    gradients_like,
    make_inputs,
    map_floats,
    named,
    require_grad,
)
from d2vkern.testing import assert_bitwise_equal

FEW = 1024
"""values below which the ratio of two root-mean-square errors is chance, like that of two largest errors"""


class Gate:
    """The parity check of a case: holds the oracle's results, takes variants one by one."""

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings = case, settings
        wide = torch.float64 if case.dtype == torch.float32 else torch.float32
        with _exact_matmuls():
            self.exact = self._results(case.plain, wide)
        self.yardstick = self._results(case.plain)
        self.eager = self._results(lambda inputs: case.call(inputs, "eager"))

    def check(self, run: Call) -> None:
        """Raise AssertionError naming the result that differs."""
        results = self._results(run)
        if results.keys() != self.eager.keys():
            raise AssertionError(f"results are {sorted(results)}, eager's are {sorted(self.eager)}")
        for name, actual in results.items():
            try:
                if name in self.case.bitwise or not actual.is_floating_point():
                    assert_bitwise_equal(actual, self.eager[name])
                if actual.is_floating_point():
                    assert_as_close(actual, self.yardstick[name], self.exact[name])
                else:
                    assert_bitwise_equal(actual, self.exact[name])
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error

    def _results(self, run: Call, upcast: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of a run on fresh inputs, by name."""
        case = self.case
        inputs = make_inputs(case, self.settings, 0)
        if upcast is not None:
            inputs = require_grad(case, map_floats(inputs, lambda t: t.detach().to(upcast)))
        for _ in range(case.gate_calls):
            outputs = named(run(inputs))
        results = dict(outputs)
        if case.leaves:
            gradients = gradients_like(outputs, self.settings, case.dtype)
            results |= {f"grad {name}": g for name, g in backward(case, inputs, outputs, gradients).items()}
        if case.observe is not None:
            results = case.observe(inputs, results)
        return {name: tensor.detach().clone() for name, tensor in results.items()}


def assert_as_close(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Assert that `actual` is about as close to `exact` as `plain` is, which has its dtype."""
    if (actual.shape, actual.dtype) != (plain.shape, plain.dtype):
        raise AssertionError(
            f"is {actual.dtype} {tuple(actual.shape)}, plain PyTorch's is {plain.dtype} {tuple(plain.shape)}"
        )
    if exact.numel() == 0:
        return
    truth = exact.double()
    error, allowed = actual.double() - truth, plain.double() - truth
    rounding = 4 * torch.finfo(actual.dtype).eps
    few = exact.numel() < FEW
    for name, factor, norm in (("largest", 4, _largest), ("root-mean-square", 4 if few else 2, _rms)):
        ours, bound = norm(error), factor * norm(allowed) + rounding * norm(truth)
        if not ours <= bound:
            raise AssertionError(
                f"{name} error {ours:.3e} is above {bound:.3e} = "
                f"{factor} * plain PyTorch's {norm(allowed):.3e} + 4 roundings"
            )


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


class _exact_matmuls:
    """TF32 off, whatever the user has set: the oracle of bf16 cases runs in fp32."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before
