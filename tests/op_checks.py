"""What the tests of differentiable ops share: an op beside a plain formulation, values and gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager

Function = Callable[..., Tensor]


def leaf(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Normal values that want a gradient."""
    return (torch.randn(shape, dtype=dtype) * scale).requires_grad_()


def values_and_gradients(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, then the gradient of each input that wants one, for a fixed gradient of the output.

    That is the same in every dtype: its values have the few bits of bf16.
    """
    out = function(*inputs)
    dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos() * 2 - 1
    wanted = [x for x in inputs if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, dout.bfloat16().view(out.shape).to(out))]


def assert_equals_plain(op: Function, plain: Function, inputs: Sequence[Tensor], tolerance: float) -> None:
    """Values and all gradients agree; gradients have their input's shape and dtype."""
    ours, theirs = values_and_gradients(op, inputs), values_and_gradients(plain, inputs)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_low_precision(
    op: Function, plain: Function, inputs: Sequence[Tensor], dtype: torch.dtype, masters: bool = False
) -> None:
    """In `dtype` the op is at most twice as far from fp64 as the plain formulation in the same dtype.

    masters: the inputs after the first stay fp32, and so must their gradients.
    """

    def cast(i: int, x: Tensor) -> Tensor:
        low = x.detach().to(torch.float32 if masters and i else dtype)
        return low.requires_grad_(x.requires_grad)

    low = [cast(i, x) for i, x in enumerate(inputs)]
    exact = values_and_gradients(plain, [x.detach().double().requires_grad_(x.requires_grad) for x in low])
    ours, theirs = values_and_gradients(op, low), values_and_gradients(plain, low)
    wanted = [x.dtype for x in low if x.requires_grad]
    assert [x.dtype for x in ours] == [dtype, *wanted]
    for actual, eager, reference in zip(ours, theirs, exact, strict=True):
        assert_no_worse_than_eager(actual, eager, reference)


def assert_repeats(op: Function, inputs: Sequence[Tensor]) -> None:
    """Twice the same bits, inputs untouched."""
    before = [x.detach().clone() for x in inputs]
    for first, second in zip(values_and_gradients(op, inputs), values_and_gradients(op, inputs), strict=True):
        assert_bitwise_equal(first, second)
    for x, copy in zip(inputs, before, strict=True):
        assert_bitwise_equal(x.detach(), copy)


def assert_follows_autocast(op: Function, inputs: Sequence[Tensor]) -> None:
    """Under autocast to fp16 the bits of a first input in fp16; every gradient has its input's dtype."""
    expected = values_and_gradients(lambda x, *rest: op(x.half(), *rest), inputs)
    with torch.autocast(inputs[0].device.type, torch.float16):
        actual = values_and_gradients(op, inputs)
    assert [x.dtype for x in actual] == [torch.float16, *(x.dtype for x in inputs if x.requires_grad)]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bitwise_equal(ours, theirs)


def spread(x: Tensor) -> Tensor:
    """The same values with strides that are not contiguous (first and last dimension swapped in memory)."""
    view = x.detach().transpose(0, -1).contiguous().transpose(0, -1)
    return view.requires_grad_(x.requires_grad)
