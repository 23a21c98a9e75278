"""The test helpers that d2vkern ships: an oracle that can fail, bit reports, memory with temporaries."""

import pytest
import torch
from torch import Tensor

from d2vkern.testing import FEW, assert_bitwise_equal, assert_no_worse_than_eager, live_memory, peak_memory

MIB = 1 << 20


def _mib(tensors: float) -> Tensor:
    return torch.ones(int(tensors * MIB // 4))


def test_oracle_takes_twice_eagers_error_and_no_more() -> None:
    reference = torch.linspace(1, 2, 100, dtype=torch.float64)
    eager = (reference + 1e-3).float()
    assert_no_worse_than_eager((reference - 1.9e-3).float(), eager, reference)
    with pytest.raises(AssertionError, match="root-mean-square error 2.100e-03 is above 2.000e-03"):
        assert_no_worse_than_eager((reference - 2.1e-3).float(), eager, reference)
    spiky = eager.clone()
    spiky[0] += 2.9e-3
    assert_no_worse_than_eager(spiky, eager, reference)
    spiky[0] += 0.2e-3
    with pytest.raises(AssertionError, match="maximum error 4.100e-03 is above 4.000e-03"):
        assert_no_worse_than_eager(spiky, eager, reference)
    few = slice(0, FEW - 1)
    assert_no_worse_than_eager((reference - 3.9e-3).float()[few], eager[few], reference[few])


def test_oracle_allows_one_rounding_where_eager_is_exact() -> None:
    reference = torch.full((FEW,), 1.0 + 2**-9, dtype=torch.float64)
    actual = reference.bfloat16()
    assert_no_worse_than_eager(actual, actual, reference)
    away = torch.full((FEW,), 1.0 + 2**-6).bfloat16()  # two ulps of bf16
    with pytest.raises(AssertionError, match="maximum error"):
        assert_no_worse_than_eager(away, actual, reference)


def test_oracle_allows_four_roundings_where_eager_gets_few_values_right_by_chance() -> None:
    one = torch.ones(FEW - 1)
    assert_no_worse_than_eager(one + 2 * 2**-23, one, one.double())
    with pytest.raises(AssertionError, match="maximum error"):
        assert_no_worse_than_eager(one + 3 * 2**-23, one, one.double())
    many = torch.ones(FEW)
    with pytest.raises(AssertionError, match="maximum error"):
        assert_no_worse_than_eager(many + 2 * 2**-23, many, many.double())


def test_oracle_sees_nan_infinity_and_shape() -> None:
    reference = torch.tensor([1.0, float("inf")])
    assert_no_worse_than_eager(reference, reference, reference)
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse_than_eager(torch.tensor([1.0, 2.0]), reference, reference)
    with pytest.raises(AssertionError, match="error nan"):
        assert_no_worse_than_eager(torch.tensor([float("nan"), float("inf")]), reference, reference)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_no_worse_than_eager(reference[:1], reference, reference)
    with pytest.raises(AssertionError, match="dtypes differ"):
        assert_no_worse_than_eager(reference.half(), reference, reference)


def test_bitwise_reports_the_first_mismatch() -> None:
    expected = torch.zeros(2, 3)
    assert_bitwise_equal(expected.clone(), expected)
    actual = expected.clone()
    actual[1, 0], actual[1, 2] = -0.0, 1.0
    with pytest.raises(
        AssertionError, match=r"2 of 6 values differ, first at \(1, 0\): -0.0 \(0x80000000\), expected"
    ):
        assert_bitwise_equal(actual, expected)
    nan = torch.tensor(float("nan"))
    assert_bitwise_equal(nan, nan.clone())
    with pytest.raises(AssertionError, match="torch.int32"):
        assert_bitwise_equal(expected.int(), expected)


def test_peak_counts_temporaries_and_ignores_what_was_there() -> None:
    held = _mib(4)

    def two_at_once() -> Tensor:
        first = held + 1
        second = first + 1
        del first
        return second.sum()

    assert 8 * MIB <= peak_memory(two_at_once) < 8 * MIB + 4096
    # A temporary that only exists inside one C++ operator.
    assert (
        peak_memory(lambda: torch.nn.functional.softmax(held.bfloat16(), 0, dtype=torch.float32).sum())
        >= 6 * MIB
    )
    assert peak_memory(lambda: None) == 0


def test_live_memory_counts_what_backward_will_need() -> None:
    x = _mib(2).requires_grad_()
    y, held = live_memory(lambda: x.exp().sum())
    # exp keeps its output, sum nothing; y itself is a scalar.
    assert 2 * MIB <= held < 2 * MIB + 4096
    _, change = live_memory(y.backward)
    # The saved output goes, the gradient comes.
    assert abs(change) < 4096
    assert x.grad is not None
