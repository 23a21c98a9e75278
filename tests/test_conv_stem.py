"""conv_stem against F.conv1d, F.layer_norm and F.gelu; kernels and strides of the speech encoder, errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern import conv_stem
from d2vkern.reference import conv_stem as reference
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, live_memory

from .op_checks import (
    assert_equals_plain,
    assert_low_precision,
    assert_repeats,
    leaf,
    spread,
    values_and_gradients,
)

# B, T, C, O, kernel, stride
SHAPES = {
    "waveform": (2, 43, 1, 6, 10, 5),
    "kernel 3, stride 2": (2, 23, 32, 6, 3, 2),
    "kernel 2, stride 2": (2, 22, 40, 5, 2, 2),
    "three phases": (2, 23, 32, 6, 5, 2),
    "no overlap": (2, 23, 70, 4, 3, 3),
    "gaps between windows": (3, 29, 33, 4, 2, 5),
    "narrow, overlapping": (2, 20, 2, 3, 7, 3),
    "one frame": (2, 3, 32, 4, 3, 2),
    "one frame of a waveform": (1, 10, 1, 4, 10, 5),
    "stride 1": (2, 9, 64, 3, 3, 1),
}
Shape = tuple[int, int, int, int, int, int]
WIDE: dict[str, Shape] = {
    "waveform": (2, 12003, 1, 200, 10, 5),
    "kernel 3, stride 2": (2, 405, 150, 140, 3, 2),
    "kernel 2, stride 2": (2, 404, 150, 140, 2, 2),
}
"""every product is large enough for oneDNN"""
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, norm_weight, norm_bias."""
    b, t, c, o, k, _ = shape
    weight = leaf(o, c, k, dtype=dtype, scale=(c * k) ** -0.5)
    return [leaf(b, t, c, dtype=dtype), weight, leaf(o, dtype=dtype), leaf(o, dtype=dtype)]


def op(stride: int, eps: float = 1e-5) -> Any:
    return lambda x, weight, nw, nb: conv_stem(x, weight, stride, nw, nb, eps)


def plain(stride: int, eps: float = 1e-5) -> Any:
    def run(x: Tensor, weight: Tensor, nw: Tensor, nb: Tensor) -> Tensor:
        weight, nw, nb = (p.to(x.dtype) for p in (weight, nw, nb))
        conv = F.conv1d(x.transpose(1, 2), weight, stride=stride).transpose(1, 2)
        return F.gelu(F.layer_norm(conv, conv.shape[2:], nw, nb, eps))

    return run


@shapes
def test_matches_torch(shape: Shape) -> None:
    assert_equals_plain(op(shape[-1]), plain(shape[-1]), make_case(shape), 1e-10)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
@pytest.mark.parametrize(
    "shape", [*SHAPES.values(), *WIDE.values()], ids=[*SHAPES, *(f"{name}, wide" for name in WIDE)]
)
def test_onednn_is_as_exact_as_eager(shape: Shape) -> None:
    stride = shape[-1]
    inputs = make_case(shape, torch.float32)
    exact = values_and_gradients(plain(stride), [x.detach().double().requires_grad_() for x in inputs])

    def run(backend: str) -> list[Tensor]:
        return values_and_gradients(
            lambda x, weight, nw, nb: conv_stem(x, weight, stride, nw, nb, backend=backend), inputs
        )

    for ours, eager, truth in zip(run("onednn"), run("eager"), exact, strict=True):
        assert_no_worse_than_eager(ours, eager, truth)
    for first, second in zip(run("onednn"), run("onednn"), strict=True):
        assert_bitwise_equal(first, second)


def test_both_ways_of_windowing_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["narrow, overlapping"]
    gathered = values_and_gradients(op(3), make_case(shape))
    torch.manual_seed(0)
    monkeypatch.setattr(reference, "_NARROW", 0)
    for ours, theirs in zip(values_and_gradients(op(3), make_case(shape)), gathered, strict=True):
        assert ours.shape == theirs.shape
    assert_equals_plain(op(3), plain(3), make_case(shape), 1e-10)


@shapes
@pytest.mark.parametrize("frames", [1, 3])
def test_blocks_of_frames_give_the_same(shape: Shape, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK_BYTES", frames * shape[3] * 8)
    b, t, _, o, k, stride = shape
    blocks = reference._blocks(torch.empty(b, t, 1, dtype=torch.float64), (t - k) // stride + 1, o)
    assert {end - start for _, start, end in blocks} <= set(range(1, frames + 1))
    assert_equals_plain(op(stride), plain(stride), make_case(shape), 1e-10)


def test_samples_left_over_have_no_gradient() -> None:
    inputs = make_case((2, 24, 32, 4, 3, 2))
    dx = values_and_gradients(op(2), inputs)[1]
    assert (dx[:, 23] == 0).all() and (dx[:, :23] != 0).any(2).all()


def test_eps() -> None:
    inputs = make_case(SHAPES["waveform"])
    inputs[0] = (inputs[0].detach() * 1e-3).requires_grad_()
    assert_equals_plain(op(5, 1e-2), plain(5, 1e-2), inputs, 1e-10)


@pytest.mark.parametrize("shape", [(1, 7, 2, 3, 3, 2), (2, 7, 33, 2, 3, 2)], ids=["narrow", "wide"])
def test_gradcheck(shape: Shape) -> None:
    assert torch.autograd.gradcheck(op(shape[-1]), tuple(make_case(shape)))


@pytest.mark.parametrize("wanted", range(4), ids=["x", "weight", "norm_weight", "norm_bias"])
def test_each_gradient_alone(wanted: int) -> None:
    shape = SHAPES["kernel 3, stride 2"]
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(make_case(shape))]
    assert_equals_plain(op(2), plain(2), inputs, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True], ids=["one dtype", "fp32 masters"])
@pytest.mark.parametrize("shape", [(2, 403, 1, 16, 10, 5), (2, 83, 32, 16, 3, 2)], ids=["waveform", "wide"])
def test_low_precision(shape: Shape, masters: bool, dtype: torch.dtype) -> None:
    inputs = make_case(shape, torch.float32)
    assert_low_precision(op(shape[-1]), plain(shape[-1]), inputs, dtype, masters)


@pytest.mark.parametrize("name", ["waveform", "kernel 3, stride 2"])
def test_repeats_bitwise(name: str) -> None:
    assert_repeats(op(SHAPES[name][-1]), make_case(SHAPES[name], torch.float32))


def test_non_contiguous_inputs() -> None:
    shape = SHAPES["three phases"]
    inputs = make_case(shape)
    expected = values_and_gradients(op(2), inputs)
    actual = values_and_gradients(op(2), [spread(x) for x in inputs])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    # a slice of a longer signal starts inside its storage
    longer = torch.cat([inputs[0], inputs[0]], 1).detach()[1:, 5:28]
    torch.testing.assert_close(op(2)(longer, *inputs[1:]), plain(2)(longer, *inputs[1:]))


def test_zero_size() -> None:
    inputs = make_case((0, 23, 32, 6, 3, 2))
    out, dx, *grads = values_and_gradients(op(2), inputs)
    assert out.shape == (0, 11, 6) and dx.shape == (0, 23, 32)
    for grad, x in zip(grads, inputs[1:], strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_windows_are_not_held() -> None:
    shape = (4, 2003, 64, 64, 3, 2)  # the output takes 1 MiB, the windows would take 3 MiB
    inputs = make_case(shape, torch.float32)
    out, held = live_memory(lambda: op(2)(*inputs))
    assert held < 2 * out.nbytes + out.nbytes // 4, "more than the output, the convolution and its statistics"


X, WEIGHT, NORM = torch.zeros(2, 20, 4), torch.zeros(6, 4, 3), torch.ones(6)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x shape": ({"x": X[0]}, ValueError, r"conv_stem: x must have shape \(B, T, C\), got \(20, 4\)"),
    "x dtype": ({"x": X.int()}, TypeError, "conv_stem: x must have dtype .*, got int32"),
    "too short": ({"x": X[:, :2]}, ValueError, "conv_stem: x frames T must be >= 3, got 2"),
    "weight shape": (
        {"weight": WEIGHT[:, :3]},
        ValueError,
        r"conv_stem: weight must have shape \(O, 4, k\) like x, got \(6, 3, 3\)",
    ),
    "weight dtype": (
        {"weight": WEIGHT.half()},
        TypeError,
        "conv_stem: weight must have dtype .*, got float16",
    ),
    "norm shape": (
        {"norm_bias": NORM[:5]},
        ValueError,
        r"conv_stem: norm_bias must have shape \(6,\) like weight, got \(5,\)",
    ),
    "stride": ({"stride": 0}, ValueError, "conv_stem: stride must be >= 1, got 0"),
    "eps": ({"eps": -1.0}, ValueError, "conv_stem: eps must be >= 0.0, got -1.0"),
    "device": (
        {"norm_weight": NORM.to("meta")},
        ValueError,
        "conv_stem: norm_weight must be on cpu like x, got meta",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": X, "weight": WEIGHT, "stride": 2, "norm_weight": NORM, "norm_bias": NORM}
    with pytest.raises(error, match=message):
        conv_stem(**{**given, **changed})
