"""gelu_mlp against F.linear and F.gelu; gradients, dropout, what is held in memory, errors."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern import gelu_mlp
from d2vkern.reference._dropout import keep_mask
from d2vkern.testing import assert_bitwise_equal, live_memory, peak_memory

from .op_checks import (
    assert_equals_plain,
    assert_low_precision,
    assert_repeats,
    leaf,
    spread,
    values_and_gradients,
)

# leading sizes, D, F, O
SHAPES = {
    "block": ((3, 5), 8, 32, 8),
    "one token": ((1, 1), 6, 24, 6),
    "rows, narrow": ((7,), 12, 5, 3),
    "primes, four dimensions": ((2, 3, 5), 7, 11, 13),
}
Shape = tuple[tuple[int, ...], int, int, int]
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, w1, b1, w2, b2."""
    rows, d, f, o = shape
    sizes = ((*rows, d), (f, d), (f,), (o, f), (o,))
    return [leaf(*size, dtype=dtype, scale=0.5 if i in (1, 3) else 1.0) for i, size in enumerate(sizes)]


def plain(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    factor: Tensor | None = None,
    approximate: str = "none",
) -> Tensor:
    w1, b1, w2, b2 = (None if p is None else p.to(x.dtype) for p in (w1, b1, w2, b2))
    hidden = F.gelu(F.linear(x, w1, b1), approximate=approximate)
    return F.linear(hidden if factor is None else hidden * factor, w2, b2)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@shapes
def test_matches_torch(shape: Shape, approximate: str) -> None:
    form = {"approximate": approximate}
    assert_equals_plain(partial(gelu_mlp, **form), partial(plain, **form), make_case(shape), 1e-12)


@pytest.mark.parametrize("biases", ["first", "second", "none"])
def test_biases_may_be_left_out(biases: str) -> None:
    x, w1, b1, w2, b2 = make_case(SHAPES["block"])
    chosen = {"first": [b1], "second": [b2], "none": []}[biases]

    def run(function: Any) -> Any:
        def call(x: Tensor, w1: Tensor, w2: Tensor, *given: Tensor) -> Tensor:
            first = given[0] if biases == "first" else None
            second = given[0] if biases == "second" else None
            return function(x, w1, first, w2, second)

        return call

    assert_equals_plain(run(gelu_mlp), run(plain), [x, w1, w2, *chosen], 1e-12)


def test_gelu_is_exact() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).view(-1, 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    expected = x * 0.5 * torch.erfc(-x / 2**0.5)
    torch.testing.assert_close(gelu_mlp(x, one, None, one, None), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float, approximate: str) -> None:
    inputs = tuple(make_case(((2, 2), 3, 5, 2)))
    call = partial(gelu_mlp, dropout_p=dropout_p, seed=5, approximate=approximate)
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("wanted", range(5), ids=["x", "w1", "b1", "w2", "b2"])
def test_each_gradient_alone(wanted: int) -> None:
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(make_case(SHAPES["block"]))]
    assert_equals_plain(gelu_mlp, plain, inputs, 1e-12)


def test_dropout_scales_what_it_keeps() -> None:
    factor = keep_mask((3, 5, 32), 0.3, torch.device("cpu"), seed=11).double() / 0.7
    assert_equals_plain(
        lambda *v: gelu_mlp(*v, dropout_p=0.3, seed=11),
        lambda *v: plain(*v, factor=factor),
        make_case(SHAPES["block"]),
        1e-12,
    )


def test_unseeded_dropout_follows_torchs_generator() -> None:
    inputs = make_case(SHAPES["block"])

    def run() -> list[Tensor]:
        return values_and_gradients(lambda *v: gelu_mlp(*v, dropout_p=0.4), inputs)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    for actual, expected in zip(run(), first, strict=True):
        assert_bitwise_equal(actual, expected)
    assert not torch.equal(first[0], second[0])


def test_unseeded_dropout_has_one_mask_forward_and_backward() -> None:
    x, w1, b1, w2, _ = make_case(SHAPES["block"])
    out = gelu_mlp(x, w1, b1, w2, None, dropout_p=0.4)
    # The output is linear in w2: <dw2, w2> is the sum of the output only under the forward's mask.
    (dw2,) = torch.autograd.grad(out.sum(), w2)
    torch.testing.assert_close((dw2 * w2).sum(), out.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True], ids=["one dtype", "fp32 masters"])
def test_low_precision(dtype: torch.dtype, masters: bool) -> None:
    inputs = make_case(((6, 16), 32, 64, 32), torch.float32)
    assert_low_precision(gelu_mlp, plain, inputs, dtype, masters)


def test_repeats_bitwise() -> None:
    inputs = make_case(SHAPES["primes, four dimensions"], torch.float32)
    assert_repeats(gelu_mlp, inputs)
    assert_repeats(lambda *v: gelu_mlp(*v, dropout_p=0.2, seed=4), inputs)


def test_non_contiguous_inputs() -> None:
    inputs = make_case(SHAPES["block"])
    expected = values_and_gradients(gelu_mlp, inputs)
    actual = values_and_gradients(gelu_mlp, [spread(x) for x in inputs])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    # a gradient with strides of zero, as sum() makes
    out = gelu_mlp(*inputs)
    (dx,) = torch.autograd.grad(out.sum(), inputs[0], retain_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(out, inputs[0], torch.ones_like(out))[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("rows", [(0, 4), (3, 0)], ids=["no samples", "no tokens"])
def test_zero_size(rows: tuple[int, ...], dropout_p: float) -> None:
    inputs = make_case((rows, 6, 12, 5))
    out, *grads = values_and_gradients(lambda *v: gelu_mlp(*v, dropout_p=dropout_p), inputs)
    assert out.shape == (*rows, 5)
    for grad, x in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_only_the_pre_activation_is_held() -> None:
    inputs = make_case(((64, 32), 64, 1024, 64), torch.float32)
    hidden, out_bytes = 64 * 32 * 1024 * 4, 64 * 32 * 64 * 4  # 8 MiB, 0.5 MiB
    out, held = live_memory(lambda: gelu_mlp(*inputs))
    assert hidden <= held < hidden + 2 * out_bytes
    assert peak_memory(lambda: gelu_mlp(*inputs)) < 2 * hidden + 3 * out_bytes
    dout = torch.ones_like(out)
    weights = 4 * inputs[1].nbytes
    assert peak_memory(lambda: torch.autograd.grad(out, inputs, dout)) < 2 * hidden + weights + 4 * out_bytes
    _, held = live_memory(lambda: gelu_mlp(*inputs, dropout_p=0.1))
    assert held < 1.25 * hidden + 2 * out_bytes, "dropout holds one byte an element"
    with torch.no_grad():
        _, held = live_memory(lambda: gelu_mlp(*inputs))
    assert held < 2 * out_bytes


X, W1, B1, W2, B2 = (torch.zeros(size) for size in ((2, 5, 8), (16, 8), (16,), (4, 16), (4,)))
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x dtype": ({"x": X.int()}, TypeError, "gelu_mlp: x must have dtype .*, got int32"),
    "w1 shape": (
        {"w1": W1[:, :7]},
        ValueError,
        r"gelu_mlp: w1 must have shape \(F, 8\) like x, got \(16, 7\)",
    ),
    "w2 shape": (
        {"w2": W2.t()},
        ValueError,
        r"gelu_mlp: w2 must have shape \(O, 16\) like w1, got \(16, 4\)",
    ),
    "b1 shape": ({"b1": B2}, ValueError, r"gelu_mlp: b1 must have shape \(16,\) like w1, got \(4,\)"),
    "b2 shape": ({"b2": B1}, ValueError, r"gelu_mlp: b2 must have shape \(4,\) like w2, got \(16,\)"),
    "w1 dtype": ({"w1": W1.half()}, TypeError, "gelu_mlp: w1 must have dtype .*, got float16"),
    "masters": (
        {"x": X.half(), "b2": B2.double()},
        TypeError,
        "gelu_mlp: b2 must have dtype .*, got float64",
    ),
    "device": ({"w2": W2.to("meta")}, ValueError, "gelu_mlp: w2 must be on cpu like x, got meta"),
    "dropout": ({"dropout_p": -0.1}, ValueError, "gelu_mlp: dropout_p must be >= 0.0 and < 1.0, got -0.1"),
    "form": (
        {"approximate": "erf"},
        ValueError,
        "gelu_mlp: approximate must be one of 'none', 'tanh', got 'erf'",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gelu_mlp(**{"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2, **changed})
