"""conv_block_1d and conv_block_2d against F.conv, F.layer_norm and F.gelu; plan, rows, memory, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern import MaskPlan, conv_block_1d, conv_block_2d
from d2vkern.testing import live_memory

from .op_checks import (
    assert_equals_plain,
    assert_low_precision,
    assert_repeats,
    leaf,
    spread,
    values_and_gradients,
)

# N, T, C, O, groups, kernel, residual
SHAPES_1D = {
    "text decoder": (2, 9, 6, 6, 1, 9, False),
    "audio decoder": (3, 11, 8, 8, 4, 7, True),
    "widths differ": (2, 7, 8, 4, 2, 3, False),
    "even kernel": (2, 6, 4, 4, 2, 4, True),
    "even kernel, dense": (2, 6, 4, 6, 1, 2, False),
    "kernel 1": (2, 5, 6, 6, 3, 1, True),
    "one token": (2, 1, 4, 4, 1, 3, True),
    "kernel wider than the sequence": (2, 3, 4, 4, 1, 9, False),
    "primes": (5, 13, 7, 7, 7, 5, True),
}
# N, H, W, C, O, groups, kernel, residual
SHAPES_2D = {
    "image decoder": (2, 5, 5, 8, 8, 4, 3, True),
    "rectangle": (2, 3, 6, 4, 4, 2, 5, True),
    "widths differ": (1, 4, 4, 6, 3, 3, 3, False),
    "even kernel": (2, 4, 5, 4, 4, 2, 4, True),
    "one patch": (3, 1, 1, 4, 4, 1, 3, True),
}
Shape = tuple[Any, ...]
shapes_1d = pytest.mark.parametrize("shape", SHAPES_1D.values(), ids=SHAPES_1D)
shapes_2d = pytest.mark.parametrize("shape", SHAPES_2D.values(), ids=SHAPES_2D)


def make_case(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias for a 1-D or 2-D shape."""
    *size, c, o, groups, kernel, _ = shape
    kernels = [kernel] * (len(size) - 1)
    weight = leaf(o, c // groups, *kernels, dtype=dtype, scale=(c // groups * kernel ** len(kernels)) ** -0.5)
    return [leaf(*size, c, dtype=dtype), weight, leaf(o, dtype=dtype)]


def make_plan(samples: int, clones: int, tokens: int, masked: int) -> MaskPlan:
    return MaskPlan.from_mask(torch.rand(samples * clones, tokens).argsort(1) < masked, clones)


def make_rows(n: int, t: int, r: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """[N,R]: distinct places, in any order."""
    return torch.rand(n, t).argsort(1)[:, :r].to(dtype)


def op(shape: Shape, **settings: Any) -> Callable[..., Tensor]:
    *size, _, _, groups, _, residual = shape
    block = conv_block_1d if len(size) == 2 else conv_block_2d
    return lambda x, weight, bias=None: block(x, weight, bias, groups, residual, **settings)


def plain(shape: Shape, eps: float = 1e-5) -> Callable[..., Tensor]:
    """Channels first and back, SamePad as the original writes it."""
    *size, _, o, groups, kernel, residual = shape

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        conv = F.conv1d if x.dim() == 3 else F.conv2d
        out = conv(x.movedim(-1, 1), weight, bias, padding=kernel // 2, groups=groups)
        if kernel % 2 == 0:
            out = out[:, :, :-1] if x.dim() == 3 else out[:, :, :-1, :-1]
        out = F.gelu(F.layer_norm(out.movedim(1, -1), (o,), eps=eps))
        return out + x if residual else out

    return run


def pick(rows: Tensor, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function's output at `rows`."""
    return lambda *v: torch.stack([out[row.long()] for out, row in zip(function(*v), rows, strict=True)])


def masked(plan: MaskPlan, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function on every masked version, its masked places zeroed, as the original repeats it."""
    keep = ~plan.mask.unsqueeze(2)
    return lambda x, *v: function(x.repeat_interleave(plan.clones, 0) * keep.to(x.dtype), *v)


@shapes_1d
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_1d_matches_torch(shape: Shape, bias: bool) -> None:
    assert_equals_plain(op(shape), plain(shape), make_case(shape)[: 2 + bias], 1e-10)


@shapes_2d
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_2d_matches_torch(shape: Shape, bias: bool) -> None:
    assert_equals_plain(op(shape), plain(shape), make_case(shape)[: 2 + bias], 1e-10)


@shapes_1d
@pytest.mark.parametrize("count", ["one", "some", "all"])
def test_rows_are_the_full_output_at_those_places(shape: Shape, count: str) -> None:
    n, t = shape[:2]
    rows = make_rows(n, t, {"one": 1, "some": (t + 1) // 2, "all": t}[count])
    assert_equals_plain(op(shape, rows=rows), pick(rows, plain(shape)), make_case(shape), 1e-10)
    x, weight, bias = make_case(shape)
    torch.testing.assert_close(op(shape, rows=rows.long())(x, weight), op(shape, rows=rows)(x, weight))


@pytest.mark.parametrize(
    "name", ["audio decoder", "text decoder", "even kernel", "widths differ", "one token"]
)
@pytest.mark.parametrize("clones", [1, 3])
def test_plan_zeroes_masked_places(name: str, clones: int) -> None:
    b, t, *rest, _ = SHAPES_1D[name]
    shape = (b, t, *rest, False)
    plan = make_plan(b, clones, t, t // 2)
    assert_equals_plain(op(shape, plan=plan), masked(plan, plain(shape)), make_case(shape), 1e-10)


def test_eps() -> None:
    shape = SHAPES_1D["audio decoder"]
    x, weight, bias = make_case(shape)
    inputs = [(p.detach() * 1e-2).requires_grad_() for p in (x, weight, bias)]
    assert_equals_plain(op(shape, eps=1e-2), plain(shape, 1e-2), inputs, 1e-10)


SMALL = (2, 5, 4, 4, 2, 3, True)
GRADCHECKS: dict[str, tuple[Shape, Callable[[], dict[str, Any]]]] = {
    "1d": (SMALL, dict),
    "1d, even kernel": ((2, 5, 4, 4, 2, 4, True), dict),
    "1d, dense": ((2, 4, 2, 3, 1, 3, False), dict),
    "rows": (SMALL, lambda: {"rows": make_rows(2, 5, 3)}),
    "rows, even kernel, dense": ((2, 5, 4, 4, 1, 4, True), lambda: {"rows": make_rows(2, 5, 3)}),
    "plan": ((2, 5, 4, 4, 2, 3, False), lambda: {"plan": make_plan(2, 2, 5, 2)}),
    "2d": ((2, 3, 3, 4, 4, 2, 3, True), dict),
    "2d, even kernel": ((1, 3, 4, 4, 4, 2, 4, True), dict),
}


@pytest.mark.parametrize(("shape", "settings"), GRADCHECKS.values(), ids=GRADCHECKS)
def test_gradcheck(shape: Shape, settings: Callable[[], dict[str, Any]]) -> None:
    assert torch.autograd.gradcheck(op(shape, **settings()), tuple(make_case(shape)))


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
@pytest.mark.parametrize("form", ["all", "rows", "plan"])
def test_each_gradient_alone(form: str, wanted: int) -> None:
    shape = (2, 7, 4, 4, 2, 3, False)
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(make_case(shape))]
    rows, plan = make_rows(2, 7, 3), make_plan(2, 3, 7, 4)
    ours: dict[str, dict[str, Any]] = {"all": {}, "rows": {"rows": rows}, "plan": {"plan": plan}}
    theirs = {"all": plain(shape), "rows": pick(rows, plain(shape)), "plan": masked(plan, plain(shape))}
    assert_equals_plain(op(shape, **ours[form]), theirs[form], inputs, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True], ids=["one dtype", "fp32 masters"])
@pytest.mark.parametrize("form", ["1d", "rows", "plan", "2d"])
def test_low_precision(form: str, masters: bool, dtype: torch.dtype) -> None:
    shape: Shape = (3, 6, 6, 16, 16, 4, 3, True) if form == "2d" else (3, 24, 16, 16, 2, 5, form == "1d")
    inputs = make_case(shape, torch.float32)
    rows, plan = make_rows(3, 24, 10), make_plan(3, 2, 24, 12)
    settings: dict[str, Any] = {"rows": {"rows": rows}, "plan": {"plan": plan}}.get(form, {})
    theirs = {"rows": pick(rows, plain(shape)), "plan": masked(plan, plain(shape))}.get(form, plain(shape))
    assert_low_precision(op(shape, **settings), theirs, inputs, dtype, masters)


@pytest.mark.parametrize("form", ["1d", "rows", "plan", "2d"])
def test_repeats_bitwise(form: str) -> None:
    shape: Shape = SHAPES_2D["rectangle"] if form == "2d" else (3, 13, 8, 8, 2, 5, form == "1d")
    settings = {"rows": {"rows": make_rows(3, 13, 6)}, "plan": {"plan": make_plan(3, 4, 13, 6)}}.get(form, {})
    assert_repeats(op(shape, **settings), make_case(shape, torch.float32))


@pytest.mark.parametrize("form", ["1d", "rows", "plan", "2d"])
def test_non_contiguous_inputs(form: str) -> None:
    shape: Shape = SHAPES_2D["rectangle"] if form == "2d" else (3, 13, 8, 8, 2, 5, form == "1d")
    rows = make_rows(3, 13, 6)
    settings = {"rows": {"rows": rows}, "plan": {"plan": make_plan(3, 4, 13, 6)}}.get(form, {})
    inputs = make_case(shape)
    expected = values_and_gradients(op(shape, **settings), inputs)
    if form == "rows":
        settings = {"rows": spread(rows)}
    for ours, theirs in zip(
        values_and_gradients(op(shape, **settings), [spread(x) for x in inputs]), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    # a gradient with strides of zero, as sum() makes
    out = op(shape, **settings)(*inputs)
    (dx,) = torch.autograd.grad(out.sum(), inputs[0], retain_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(out, inputs[0], torch.ones_like(out))[0])


@pytest.mark.parametrize(
    ("shape", "settings", "expected"),
    [
        ((0, 5, 4, 4, 2, 3, True), {}, (0, 5, 4)),
        ((0, 3, 3, 4, 4, 2, 3, True), {}, (0, 3, 3, 4)),
        ((2, 5, 4, 4, 2, 3, True), {"rows": torch.zeros(2, 0, dtype=torch.int32)}, (2, 0, 4)),
        ((0, 5, 4, 4, 1, 3, True), {"rows": torch.zeros(0, 2, dtype=torch.int32)}, (0, 2, 4)),
    ],
    ids=["no samples", "no images", "no rows", "no samples, rows"],
)
def test_zero_size(shape: Shape, settings: dict[str, Any], expected: tuple[int, ...]) -> None:
    inputs = make_case(shape)
    out, *grads = values_and_gradients(op(shape, **settings), inputs)
    assert out.shape == expected
    for grad, x in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_all_masked_is_the_bias_everywhere() -> None:
    shape = (2, 5, 4, 6, 2, 3, False)
    x, weight, bias = make_case(shape)
    plan = MaskPlan.from_mask(torch.ones(4, 5, dtype=torch.bool), 2)
    out = op(shape, plan=plan)(x, weight, bias)
    torch.testing.assert_close(out, F.gelu(F.layer_norm(bias, (6,))).expand(4, 5, 6))
    assert (torch.autograd.grad(out.square().sum(), x)[0] == 0).all()


def test_plan_holds_no_copy_of_the_input() -> None:
    clones, tokens, channels, out_channels = 16, 128, 128, 8
    x, weight, bias = make_case((4, tokens, channels, out_channels, 1, 3, False), torch.float32)
    plan = make_plan(4, clones, tokens, 64)
    copies = clones * x.nbytes  # 4 MiB; output and convolution are 0.25 MiB each
    out, held = live_memory(lambda: conv_block_1d(x, weight, bias, plan=plan))
    assert held < 3 * out.nbytes < copies / 2


def test_rows_hold_rows_only() -> None:
    x, weight, bias = make_case((8, 256, 32, 256, 1, 3, False), torch.float32)
    rows = make_rows(8, 256, 32)
    full = 8 * 256 * 256 * 4  # 2 MiB; the output's rows are an eighth
    out, held = live_memory(lambda: conv_block_1d(x, weight, bias, rows=rows))
    assert out.nbytes == full // 8
    assert held < 3 * out.nbytes


X1, W1 = torch.zeros(4, 5, 8), torch.zeros(8, 4, 3)
X2, W2 = torch.zeros(2, 5, 5, 8), torch.zeros(8, 4, 3, 3)
PLAN = MaskPlan.from_mask(torch.zeros(8, 5, dtype=torch.bool), 2)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x shape": ({"x": X2}, ValueError, r"x must have shape \(N, T, C\), got \(2, 5, 5, 8\)"),
    "x dtype": ({"x": X1.int()}, TypeError, "x must have dtype .*, got int32"),
    "groups of x": ({"groups": 3}, ValueError, "groups must divide the 8 channels of x, got 3"),
    "groups of weight": (
        {"weight": W1[:7]},
        ValueError,
        "groups must divide the 7 output channels of weight, got 2",
    ),
    "no groups": ({"groups": 0}, ValueError, "groups must be >= 1, got 0"),
    "weight shape": (
        {"groups": 1},
        ValueError,
        r"weight must have shape \(O, 8, k\) like x and groups, got \(8, 4, 3\)",
    ),
    "weight dtype": ({"weight": W1.half()}, TypeError, "weight must have dtype .*, got float16"),
    "bias shape": (
        {"bias": torch.ones(4)},
        ValueError,
        r"bias must have shape \(8,\) like weight, got \(4,\)",
    ),
    "residual": (
        {"weight": W1[:4], "residual": True},
        ValueError,
        "residual needs as many outputs as the 8 channels, got 4",
    ),
    "eps": ({"eps": -1.0}, ValueError, "eps must be >= 0.0, got -1.0"),
    "device": ({"weight": W1.to("meta")}, ValueError, "weight must be on cpu like x, got meta"),
    "plan": (
        {"plan": MaskPlan.from_mask(torch.zeros(8, 6, dtype=torch.bool), 2)},
        ValueError,
        r"x must have shape \(4, 6, 8\) like plan, got \(4, 5, 8\)",
    ),
    "plan and residual": (
        {"plan": PLAN, "residual": True},
        ValueError,
        "plan must come without residual and rows, got residual=True",
    ),
    "rows shape": (
        {"rows": torch.zeros(3, 2, dtype=torch.int32)},
        ValueError,
        r"rows must have shape \(4, R\) like x, got \(3, 2\)",
    ),
    "rows dtype": (
        {"rows": torch.zeros(4, 2)},
        TypeError,
        "rows must have dtype int64 or int32, got float32",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_1d_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="conv_block_1d: " + message):
        conv_block_1d(**{"x": X1, "weight": W1, "groups": 2, **changed})


def test_2d_refusals() -> None:
    with pytest.raises(ValueError, match=r"conv_block_2d: x must have shape \(N, H, W, C\), got \(4, 5, 8\)"):
        conv_block_2d(X1, W2, groups=2)
    with pytest.raises(ValueError, match=r"weight must have shape \(O, 4, k, k\) like x and groups"):
        conv_block_2d(X2, W2[..., :2], groups=2)
