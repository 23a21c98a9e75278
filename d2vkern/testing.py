"""Helpers for tests of kernels, ours and other people's: oracles, a backend spy, peak memory."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from d2vkern import _context

Result = TypeVar("Result")

FEW = 16
"""values below which the ratio of two root-mean-square errors is chance, like that of two largest errors"""


@contextmanager
def backend_spy() -> Iterator[list[tuple[str, str]]]:
    """Yield a list that receives (stem, backend) for every op this thread calls here, compiled or not.

    A silent fallback keeps a parity test green; the spy shows it: ``assert calls == [("gather", "triton")]``.
    """
    calls: list[tuple[str, str]] = []
    with _context.watch(calls):
        yield calls


def assert_no_worse_than_eager(
    actual: Tensor, same_dtype_eager: Tensor, reference: Tensor, factor: float = 2.0
) -> None:
    """Assert that `actual` is at most `factor` times as far from the reference as eager in the same dtype.

    reference: the same computation in fp32 or fp64. Root-mean-square errors are compared by the factor,
    maxima and whatever is made of fewer than `FEW` values by twice that: there two equally good orders of
    summation differ by more. The rounding of one store (half an ulp of the largest reference value) is
    allowed on top, four of them for fewer than `FEW` values, which eager may all get right by chance.
    NaN and infinity must stand at the same places as in the reference.
    """
    if actual.shape != reference.shape or same_dtype_eager.shape != reference.shape:
        shapes = tuple(actual.shape), tuple(same_dtype_eager.shape), tuple(reference.shape)
        raise AssertionError("shapes differ: actual {}, eager {}, reference {}".format(*shapes))
    if actual.dtype != same_dtype_eager.dtype:
        raise AssertionError(f"dtypes differ: actual {actual.dtype}, eager {same_dtype_eager.dtype}")
    if reference.numel() == 0:
        return
    exact = reference.detach().double()
    finite = exact.isfinite()
    odd, expected_odd = actual.detach().double()[~finite], exact[~finite]
    if not torch.equal(odd.nan_to_num(nan=0.0), expected_odd.nan_to_num(nan=0.0)) or not torch.equal(
        odd.isnan(), expected_odd.isnan()
    ):
        raise AssertionError("actual differs from the reference where that is not finite")
    exact = exact[finite]
    error = (actual.detach().double()[finite] - exact).abs()
    eager_error = (same_dtype_eager.detach().double()[finite] - exact).abs()
    if error.numel() == 0:
        return
    rounding = exact.abs().max().item() * torch.finfo(actual.dtype).eps / 2
    if error.numel() < FEW:
        rounding *= 4
    mean_factor = 2 * factor if error.numel() < FEW else factor
    for name, norm, times in (("maximum", torch.max, 2 * factor), ("root-mean-square", _rms, mean_factor)):
        ours, bound = norm(error).item(), times * norm(eager_error).item() + rounding
        if not ours <= bound:
            raise AssertionError(
                f"{name} error {ours:.3e} is above {bound:.3e} = {times} * eager's "
                f"{norm(eager_error).item():.3e} + rounding {rounding:.3e}"
            )


def assert_bitwise_equal(actual: Tensor, expected: Tensor) -> None:
    """Assert equal shape, dtype and bits, reporting the first mismatch.

    NaN equals the same NaN; -0.0 differs from 0.0.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"actual is {actual.dtype} {tuple(actual.shape)}, "
            f"expected {expected.dtype} {tuple(expected.shape)}"
        )
    differs = (_bits(actual) != _bits(expected)).nonzero()
    if len(differs):
        first = tuple(differs[0].tolist())
        raise AssertionError(
            f"{len(differs)} of {actual.numel()} values differ, first at {first}: "
            f"{_show(actual, first)}, expected {_show(expected, first)}"
        )


def peak_memory(fn: Callable[[], object]) -> int:
    """Bytes by which CPU tensor memory during `fn()` rises above its start, at its highest.

    Counts every allocator call: tensors saved for backward and temporaries inside C++ ops too.
    """
    _, changes = allocations(fn)
    peak = held = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def live_memory(fn: Callable[[], Result]) -> tuple[Result, int]:
    """Call `fn`; return its result and the bytes of CPU tensor memory still held, by the result or others."""
    result, changes = allocations(fn)
    return result, sum(changes)


def allocations(fn: Callable[[], Result]) -> tuple[Result, list[int]]:
    """The result of `fn` and the allocator's changes in bytes, in order of time."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = fn()
        gc.collect()
    session = profiler.profiler
    assert session is not None and session.kineto_results is not None
    events = [
        (event.start_ns(), event.nbytes())
        for event in session.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    return result, [change for _, change in sorted(events, key=lambda event: event[0])]


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


def _bits(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def _show(tensor: Tensor, index: tuple[int, ...]) -> str:
    value = tensor[index].item()
    if not tensor.is_floating_point():
        return repr(value)
    digits = 2 * tensor.element_size()
    bits = int(_bits(tensor)[index].item()) & ((1 << 4 * digits) - 1)
    return f"{value!r} (0x{bits:0{digits}x})"
