"""residual_norm against F.layer_norm of the sum; gradients, dropout, drop path, memory, errors."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern import residual_norm
from d2vkern.reference._dropout import keep_mask
from d2vkern.testing import assert_bitwise_equal, live_memory

from .op_checks import (
    assert_equals_plain,
    assert_low_precision,
    assert_repeats,
    leaf,
    spread,
    values_and_gradients,
)

SHAPES = {
    "block": (3, 5, 8),
    "one token": (1, 1, 6),
    "rows": (7, 12),
    "primes, four dimensions": (2, 3, 5, 7),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, update, weight, bias, update_bias, gamma."""
    rows = [leaf(*shape, dtype=dtype) for _ in range(2)]
    return rows + [leaf(shape[-1], dtype=dtype) for _ in range(4)]


def plain(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    update_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    eps: float = 1e-5,
    factor: Tensor | None = None,
) -> Tensor:
    w = None if weight is None else weight.to(x.dtype)
    b = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(plain_sum(x, update, update_bias, gamma, factor=factor), x.shape[-1:], w, b, eps)


def plain_sum(
    x: Tensor,
    update: Tensor,
    update_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    factor: Tensor | None = None,
) -> Tensor:
    if update_bias is not None:
        update = update + update_bias.to(x.dtype)
    if gamma is not None:
        update = update * gamma.to(x.dtype)
    return x + (update if factor is None else update * factor)


def op(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    update_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    return residual_norm(x, update, weight, bias, update_bias=update_bias, gamma=gamma, **settings)


def plain_prenorm(x: Tensor, update: Tensor, *rest: Tensor, **settings: Any) -> Tensor:
    """[2, ...]: the sum and its norm."""
    only_sum = plain_sum(x, update, *rest[2:], **settings)
    return torch.stack([only_sum, F.layer_norm(only_sum, x.shape[-1:], *rest[:2])])


def op_prenorm(*values: Tensor, **settings: Any) -> Tensor:
    return torch.stack(op(*values, prenorm=True, **settings))


@shapes
@pytest.mark.parametrize("given", [2, 3, 4, 5, 6], ids=["no affine", "weight", "affine", "bias", "gamma"])
def test_matches_torch(shape: tuple[int, ...], given: int) -> None:
    assert_equals_plain(op, plain, make_case(shape)[:given], 1e-12)


def test_eps() -> None:
    x, update, *_ = make_case((4, 8))
    small = [x.detach() * 1e-3, update.detach() * 1e-3]
    torch.testing.assert_close(op(*small, eps=1e-2), plain(*small, eps=1e-2))
    assert not torch.allclose(op(*small, eps=1e-2), op(*small, eps=1e-6), rtol=0.1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"dropout_p": 0.3, "seed": 3}, {"dropout_p": 0.3, "drop_path_p": 0.4, "seed": 3}],
    ids=["plain", "dropout", "dropout and path"],
)
@pytest.mark.parametrize("given", [2, 6], ids=["no affine", "everything"])
@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
def test_gradcheck(prenorm: bool, given: int, settings: dict[str, Any]) -> None:
    inputs = tuple(make_case((3, 2, 5))[:given])
    assert torch.autograd.gradcheck(lambda *values: op(*values, prenorm=prenorm, **settings), inputs)


@shapes
@pytest.mark.parametrize("given", [2, 4, 6], ids=["no affine", "affine", "update bias, gamma"])
def test_prenorm_matches_torch(shape: tuple[int, ...], given: int) -> None:
    inputs = make_case(shape)[:given]
    assert_equals_plain(op_prenorm, plain_prenorm, inputs, 1e-12)
    factor = keep_mask(shape, 0.3, torch.device("cpu"), seed=11).double() / 0.7
    assert_equals_plain(
        lambda *v: op_prenorm(*v, dropout_p=0.3, seed=11),
        lambda *v: plain_prenorm(*v, factor=factor),
        inputs,
        1e-12,
    )


def test_prenorm_outputs_may_be_used_alone() -> None:
    inputs = make_case((3, 4, 8))
    for which, used in enumerate([inputs[:2] + inputs[4:]] * 2):
        ours = torch.autograd.grad(op_prenorm(*inputs)[which].square().sum(), used)
        theirs = torch.autograd.grad(plain_prenorm(*inputs)[which].square().sum(), used)
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_fp32_stream_takes_low_updates(low: torch.dtype, dropout_p: float) -> None:
    """The sum and the norm keep fp32's digits; the update's gradient is rounded once, to its dtype."""
    x, update, *vectors = make_case((6, 16, 32), torch.float32)
    narrow = update.detach().to(low).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    run = partial(op_prenorm, dropout_p=dropout_p, seed=2)
    ours = values_and_gradients(run, [x, narrow, *vectors])
    theirs = values_and_gradients(run, [x, wide, *vectors])
    assert [t.dtype for t in ours] == [torch.float32, torch.float32, low, *[torch.float32] * 4]
    for i, (actual, expected) in enumerate(zip(ours, theirs, strict=True)):
        digits = 2 * torch.finfo(low).eps if i == 2 else 1e-6
        torch.testing.assert_close(actual.float(), expected, rtol=digits, atol=digits)


def test_dropout_scales_what_it_keeps() -> None:
    inputs = make_case((5, 7, 8))
    factor = keep_mask((5, 7, 8), 0.3, torch.device("cpu"), seed=11).double() / 0.7
    assert_equals_plain(
        lambda *v: op(*v, dropout_p=0.3, seed=11), lambda *v: plain(*v, factor=factor), inputs, 1e-12
    )


def test_dropout_and_drop_path_draw_from_different_bits() -> None:
    inputs = make_case((40, 7, 8))
    keep = keep_mask((40, 7, 8), 0.3, torch.device("cpu"), seed=11)
    path = keep_mask((40, 1, 1), 0.3, torch.device("cpu"), seed=11 ^ 1)
    factor = (keep & path).double() / 0.7**2
    assert_equals_plain(
        lambda *v: op(*v, dropout_p=0.3, drop_path_p=0.3, seed=11),
        lambda *v: plain(*v, factor=factor),
        inputs,
        1e-12,
    )


def test_drop_path_takes_whole_rows() -> None:
    x, update, weight, bias, *_ = make_case((64, 3, 8))
    out = op(x, update, weight, bias, drop_path_p=0.5, seed=2)
    unchanged = plain(x, torch.zeros_like(x), weight, bias)
    doubled = plain(x, 2 * update, weight, bias)
    dropped = torch.isclose(out, unchanged).flatten(1).all(1)
    torch.testing.assert_close(out[~dropped], doubled[~dropped])
    assert 16 < int(dropped.sum()) < 48
    (du,) = torch.autograd.grad(out.square().sum(), update)
    assert (du[dropped] == 0).all() and (du[~dropped] != 0).any()


def test_unseeded_dropout_follows_torchs_generator() -> None:
    inputs = make_case((4, 9, 8))

    def run() -> list[Tensor]:
        return values_and_gradients(lambda *v: op(*v, dropout_p=0.4, drop_path_p=0.2), inputs)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    for actual, expected in zip(run(), first, strict=True):
        assert_bitwise_equal(actual, expected)
    assert not torch.equal(first[0], second[0])


def test_unseeded_dropout_has_one_mask_forward_and_backward() -> None:
    x, update = make_case((4, 9, 8))[:2]
    out = op(x, update, dropout_p=0.5)
    dropped = torch.autograd.grad(out.square().mul(out).sum(), update)[0] == 0
    torch.testing.assert_close(out, plain(x, update, factor=2.0 * ~dropped))
    assert 0.3 < dropped.double().mean() < 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masters", [False, True], ids=["one dtype", "fp32 masters"])
def test_low_precision(dtype: torch.dtype, masters: bool) -> None:
    x, update, *rest = make_case((6, 16, 32), torch.float32)
    if not masters:
        assert_low_precision(op, plain, [x, update, *rest], dtype)
        return
    low = update.detach().to(dtype)
    assert_low_precision(
        lambda x, *v: op(x, low, *v),
        lambda x, *v: plain(x, low.to(x.dtype), *v),
        [x, *rest],
        dtype,
        masters=True,
    )


def test_repeats_bitwise() -> None:
    inputs = make_case((5, 13, 7), torch.float32)
    assert_repeats(op, inputs)
    assert_repeats(lambda *v: op(*v, dropout_p=0.2, drop_path_p=0.2, seed=4), inputs)


def test_non_contiguous_inputs() -> None:
    inputs = make_case((3, 5, 8))
    expected = values_and_gradients(op, inputs)
    actual = values_and_gradients(op, [spread(inputs[0]), spread(inputs[1]), *inputs[2:]])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    repeated = inputs[1][:1].expand(3, -1, -1)
    torch.testing.assert_close(op(inputs[0], repeated), plain(inputs[0], repeated))


@pytest.mark.parametrize("settings", [{}, {"dropout_p": 0.5, "drop_path_p": 0.5}], ids=["plain", "dropout"])
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8)], ids=["no samples", "no tokens"])
def test_zero_size(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    out, dx, du, *vectors = values_and_gradients(lambda *v: op(*v, **settings), make_case(shape))
    assert out.shape == dx.shape == du.shape == shape
    assert all(torch.equal(grad, torch.zeros(8, dtype=torch.float64)) for grad in vectors)


def test_gradients_do_not_share_memory() -> None:
    x, update = make_case((3, 4, 8))[:2]
    op(x, update).square().sum().backward()
    before = update.grad.clone()
    x.grad.zero_()
    assert torch.equal(update.grad, before)


def test_what_is_held_for_backward() -> None:
    x, update, weight, bias, *_ = make_case((64, 64, 64), torch.float32)  # 1 MiB each
    out, held = live_memory(lambda: op(x, update, weight, bias))
    assert held < 2 * out.nbytes + out.nbytes // 8, "more than the output, the sum and its statistics"
    dropped, held = live_memory(lambda: op(x, update, weight, bias, dropout_p=0.1))
    assert held < 2.25 * dropped.nbytes + dropped.nbytes // 8, "dropout holds one byte an element"


X = torch.zeros(2, 5, 8)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "update shape": (
        {"update": X[:, :4]},
        ValueError,
        r"residual_norm: update must have shape \(2, 5, 8\) like x, got \(2, 4, 8\)",
    ),
    "update dtype": (
        {"x": X.half()},
        TypeError,
        "residual_norm: update must have dtype float16 like x, got float32",
    ),
    "update dtype beside fp32": (
        {"update": X.double()},
        TypeError,
        "residual_norm: update must have dtype float32 or bfloat16 or float16, got float64",
    ),
    "x dtype": ({"x": X.int()}, TypeError, "residual_norm: x must have dtype .*, got int32"),
    "weight shape": (
        {"weight": torch.ones(7)},
        ValueError,
        r"residual_norm: weight must have shape \(8,\) like x, got \(7,\)",
    ),
    "bias dtype": (
        {"bias": torch.ones(8).half()},
        TypeError,
        "residual_norm: bias must have dtype float32 or float32, got float16",
    ),
    "update bias shape": (
        {"update_bias": torch.ones(2, 8)},
        ValueError,
        r"residual_norm: update_bias must have shape \(8,\) like x, got \(2, 8\)",
    ),
    "device": (
        {"weight": torch.ones(8, device="meta")},
        ValueError,
        "residual_norm: weight must be on cpu like x, got meta",
    ),
    "eps": ({"eps": -1.0}, ValueError, "residual_norm: eps must be >= 0.0, got -1.0"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "residual_norm: dropout_p must be >= 0.0 and < 1.0, got 1.0"),
    "drop path": (
        {"drop_path_p": float("nan")},
        ValueError,
        "residual_norm: drop_path_p must be >= 0.0 and < 1.0, got nan",
    ),
    "drop path of a vector": (
        {"x": torch.ones(8), "update": torch.ones(8), "drop_path_p": 0.1},
        ValueError,
        r"residual_norm: x must have a dimension before D with drop_path_p, got \(8,\)",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        residual_norm(**{"x": X, "update": X, **changed})
