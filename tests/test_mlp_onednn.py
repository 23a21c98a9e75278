"""gelu_mlp and linear on oneDNN's products, and eager's linear: values, gradients, refusals, choice."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import d2vkern
from d2vkern import BackendError, _backend, _cpu
from d2vkern._check_mode import force_checks
from d2vkern.peers._onednn import PIECE, product
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

from .op_checks import (
    assert_equals_plain,
    assert_low_precision,
    assert_repeats,
    spread,
    values_and_gradients,
)
from .test_mlp import SHAPES, Shape, make_case, plain, shapes

if not torch.backends.mkldnn.is_available():
    pytest.skip("this torch is built without oneDNN", allow_module_level=True)

LAYOUTS = ("rows", "columns", "gaps")
SIZES = [
    *[(5, 7, 3), (0, 4, 3), (4, 0, 3), (4, 3, 0)],  # PyTorch's
    *[(64, 2 * PIECE + 1, 40), (90, 2 * PIECE, 30), (3, PIECE, 1500), (2100, 2100, 1)],
]
WIDE: Shape = ((3, 75), 160, 200, 130)
"""every product is oneDNN's"""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def matrix(rows: int, columns: int, layout: str) -> Tensor:
    if layout == "rows":
        return torch.randn(rows, columns)
    return torch.randn(columns, rows).t() if layout == "columns" else torch.randn(rows, 2 * columns)[:, ::2]


def linear_case(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias."""
    return make_case(shape, dtype)[:3]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def on_onednn(function: Any) -> Any:
    return lambda *inputs: function(*inputs, backend="onednn")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_products_of_any_strides(size: tuple[int, int, int], first: str, second: str) -> None:
    m, k, n = size
    a, b, bias = matrix(m, k, first), matrix(k, n, second), torch.randn(n)
    for given in (None, bias):
        out = product(a, b, given)
        assert out.is_contiguous()
        exact = a.double() @ b.double() + (0.0 if given is None else given.double())
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6 * math.sqrt(k + 1) * 4)


def test_expanded_operands() -> None:
    a, b = torch.randn(300, 1).expand(300, 200), torch.randn(1, 100).expand(200, 100)
    # 200 equal terms in one chain: half an ulp of each sum, all the same way
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b, None).double(), exact, rtol=200 * 2**-24, atol=0)


def test_a_long_inner_dimension_keeps_its_digits() -> None:
    """One chain of 12,288 sums would be more than twice as far off as MKL's blocks."""
    a, b = torch.randn(64, 12 * PIECE), torch.randn(12 * PIECE, 64)
    assert_no_worse_than_eager(product(a, b, None), a @ b, a.double() @ b.double())


def test_the_product_is_a_proper_operator() -> None:
    operator = torch.ops.d2vkern.onednn_product.default
    for m, k, n in ((4, 3, 5), (900, 100, 50)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        torch.library.opcheck(operator, (a, b, torch.randn(n)))
        torch.library.opcheck(operator, (a.t().contiguous().t(), b, None))


@shapes
def test_linear_matches_torch(shape: Shape) -> None:
    assert_equals_plain(
        lambda *v: d2vkern.linear(*v, backend="eager"), plain_linear, linear_case(shape), 1e-12
    )


def test_linear_without_bias_and_each_gradient_alone() -> None:
    x, weight, bias = linear_case(SHAPES["block"])
    eager = lambda *v: d2vkern.linear(*v, backend="eager")  # noqa: E731
    assert_equals_plain(lambda *v: eager(*v, None), lambda *v: F.linear(*v), [x, weight], 1e-12)
    for wanted in range(3):
        some = [v.detach().requires_grad_(i == wanted) for i, v in enumerate((x, weight, bias))]
        assert_equals_plain(eager, plain_linear, some, 1e-12)


def test_linear_gradcheck() -> None:
    assert torch.autograd.gradcheck(d2vkern.linear, tuple(linear_case(((2, 2), 3, 5, 2))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True], ids=["one dtype", "fp32 masters"])
def test_linear_low_precision(dtype: torch.dtype, masters: bool) -> None:
    inputs = linear_case(((6, 16), 32, 64, 32), torch.float32)
    assert_low_precision(d2vkern.linear, plain_linear, inputs, dtype, masters)


def test_a_bias_of_fp32_sums_its_gradient_in_fp32() -> None:
    x, weight = torch.zeros(4096, 1).bfloat16(), torch.zeros(1, 1)
    bias = torch.zeros(1, requires_grad=True)
    d2vkern.linear(x, weight, bias).sum().backward()
    assert bias.grad is not None and bias.grad.item() == 4096
    bias.grad = None
    (d2vkern.linear(x[:257], weight, bias).float() * 1.0).sum().backward()
    assert bias.grad.item() == 257  # bf16 has 256 and 258


@pytest.mark.parametrize("change", ["width", "bias", "dtype", "device"])
def test_linear_refuses(change: str) -> None:
    x, weight, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    bad: dict[str, tuple[Tensor, Tensor, Tensor]] = {
        "width": (x, torch.randn(4, 5), bias),
        "bias": (x, weight, torch.randn(3)),
        "dtype": (x, weight.long(), bias),
        "device": (x, weight.to("meta"), bias),
    }
    with pytest.raises((ValueError, TypeError), match="^linear: "):
        d2vkern.linear(*bad[change])


@pytest.mark.parametrize("shape", [*SHAPES.values(), WIDE], ids=[*SHAPES, "wide"])
def test_onednn_matches_torch(shape: Shape) -> None:
    tanh = {"approximate": "tanh"}
    for ours, theirs, inputs in (
        (d2vkern.gelu_mlp, plain, make_case(shape, torch.float32)),
        (partial(d2vkern.gelu_mlp, **tanh), partial(plain, **tanh), make_case(shape, torch.float32)),
        (d2vkern.linear, plain_linear, linear_case(shape, torch.float32)),
    ):
        assert_equals_plain(on_onednn(ours), theirs, inputs, 1e-4)
        assert_equals_plain(on_onednn(ours), theirs, [spread(x) for x in inputs], 1e-4)


def test_onednn_is_as_exact_as_eager() -> None:
    shape = ((3, 700), 64, 2 * PIECE, 48)
    for function, inputs in (
        (d2vkern.gelu_mlp, make_case(shape, torch.float32)),
        (d2vkern.linear, linear_case(shape, torch.float32)),
    ):
        exact = values_and_gradients(function, [x.detach().double().requires_grad_() for x in inputs])
        eager = values_and_gradients(lambda *v, f=function: f(*v, backend="eager"), inputs)
        for actual, same, reference in zip(
            values_and_gradients(on_onednn(function), inputs), eager, exact, strict=True
        ):
            # 2,100 rows in one chain, where MKL adds some up side by side
            assert_no_worse_than_eager(actual, same, reference, factor=5)


def test_onednn_drops_what_eager_drops() -> None:
    inputs = make_case(WIDE, torch.float32)
    ours, theirs = (
        values_and_gradients(
            lambda *v, name=name: d2vkern.gelu_mlp(*v, dropout_p=0.4, seed=3, backend=name), inputs
        )
        for name in ("onednn", "eager")
    )
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_onednn_repeats_bitwise() -> None:
    shape = ((3, 50), 24, 2 * PIECE, 20)
    assert_repeats(on_onednn(d2vkern.gelu_mlp), make_case(shape, torch.float32))
    assert_repeats(on_onednn(d2vkern.linear), linear_case(shape, torch.float32))


@pytest.mark.parametrize("rows", [(0, 4), (3, 0)], ids=["no samples", "no tokens"])
def test_onednn_zero_size(rows: tuple[int, ...]) -> None:
    for function, inputs in (
        (d2vkern.gelu_mlp, make_case((rows, 6, 12, 5), torch.float32)),
        (d2vkern.linear, linear_case((rows, 6, 12, 5), torch.float32)),
    ):
        out, *grads = values_and_gradients(on_onednn(function), inputs)
        assert out.numel() == 0
        assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("name", ["gelu_mlp", "linear"])
def test_onednn_under_compile(name: str) -> None:
    function = getattr(d2vkern, name)
    inputs = (make_case if name == "gelu_mlp" else linear_case)(WIDE, torch.float32)
    compiled = torch.compile(on_onednn(function), fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(on_onednn(function), inputs)
    for actual, wanted in zip(values_and_gradients(compiled, inputs), expected, strict=True):
        assert_bitwise_equal(actual, wanted)


def test_the_choice_is_traced() -> None:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with backend_spy() as calls:
        expected = d2vkern.linear(x, weight)
        actual = torch.compile(d2vkern.linear, fullgraph=True, backend="aot_eager")(x, weight)
    assert_bitwise_equal(actual, expected)
    assert calls[0] == calls[1]


def test_onednn_beside_eager() -> None:
    inputs = make_case(WIDE, torch.float32)
    with force_checks(True), d2vkern.use_backend(mlp="onednn"):
        d2vkern.gelu_mlp(*inputs).sum().backward()
        d2vkern.linear(*inputs[:3]).sum().backward()


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), "fp64 tensors run on eager only"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "oneDNN's already"),
        (torch.zeros(2, 3, device="meta"), "not on meta"),
    ],
    ids=["fp64", "bf16", "meta"],
)
def test_onednn_says_what_it_refuses(x: Tensor, reason: str) -> None:
    with pytest.raises(BackendError, match=f"onednn.*cannot run: .*{reason}"):
        d2vkern.linear(x, torch.zeros(4, 3, dtype=x.dtype, device=x.device), backend="onednn")


def test_onednn_is_no_backend_of_all_ops() -> None:
    message = "'onednn' is a backend of mlp and conv_stem only, write mlp=onednn"
    with pytest.raises(BackendError, match=message), d2vkern.use_backend("onednn"):
        pass


@pytest.mark.parametrize("idle", [False, True], ids=["MKL uses all units", "MKL leaves units idle"])
def test_auto_goes_by_the_processor(idle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "mkl_leaves_units_idle", lambda: idle)
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with backend_spy() as calls:
        d2vkern.linear(x, weight)
        d2vkern.linear(x.bfloat16(), weight)
        d2vkern.linear(x.double(), weight.double())
        torch.compile(d2vkern.linear, fullgraph=True, backend="eager")(x, weight)
    fp32 = ("mlp", "onednn" if idle else "eager")
    assert calls == [fp32, ("mlp", "eager"), ("mlp", "eager"), fp32]


def test_one_import_serves_a_whole_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo sees no import that a later op of the same trace makes."""
    import d2vkern.reference.mlp  # noqa: F401

    late = _backend.REGISTRY["residual_norm"]["eager"].module
    monkeypatch.delitem(sys.modules, late, raising=False)

    def two(x: Tensor, weight: Tensor) -> Tensor:
        return d2vkern.residual_norm(d2vkern.linear(x, weight), x, None, None)

    x, weight = torch.randn(2, 3), torch.randn(3, 3)
    with d2vkern.use_backend("eager"):
        actual = torch.compile(two, fullgraph=True, backend="eager")(x, weight)
        torch.testing.assert_close(actual, two(x, weight))


def test_processor_is_what_the_kernel_says(tmp_path: Path) -> None:
    info, arm = tmp_path / "cpuinfo", tmp_path / "arm"
    first = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel name\t: x\nflags\t\t: a b\n"
    info.write_text(first + "\nprocessor\t: 1\nvendor_id\t: Other\ncpu family\t: 6\n")
    assert _cpu.processor(info) == ("AuthenticAMD", 25, "x")
    arm.write_text("processor\t: 0\nCPU implementer\t: 0x41\ncpu family\t: ?\n")
    assert _cpu.processor(arm) == _cpu.processor(tmp_path / "missing") == ("", 0, "")


@pytest.mark.parametrize(
    ("vendor", "family", "capability", "mkl", "expected"),
    [
        ("AuthenticAMD", 26, "AVX512", True, True),
        ("AuthenticAMD", 25, "AVX512", True, False),
        ("HygonGenuine", 26, "AVX512", True, False),
        ("GenuineIntel", 26, "AVX512", True, False),
        ("AuthenticAMD", 26, "AVX2", True, False),
        ("AuthenticAMD", 26, "AVX512", False, False),
        ("", 0, "AVX512", True, False),
    ],
)
def test_when_mkl_leaves_units_idle(
    vendor: str, family: int, capability: str, mkl: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu, "processor", lambda: _cpu.Processor(vendor, family))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert _cpu.mkl_leaves_units_idle() is expected
