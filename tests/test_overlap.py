"""Teachers and copies that share memory: refused on every backend where the result would hang on an order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.aot_trace import OpTrace
from d2vkern import EMA, AdamWEMA, ema_update_
from d2vkern._backend import REGISTRY, gaps
from d2vkern._overlap import check_memory

BACKENDS = [name for name in REGISTRY["ema"] if not gaps("ema", name, torch.zeros(1))]
on_all = pytest.mark.parametrize("backend", BACKENDS)


def memory(*shape: int) -> Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


@on_all
def test_partly_shared_memory_is_refused(backend: str) -> None:
    w, other = memory(8, 6), memory(8, 6)
    for teacher, student, copies, words in (
        ([w[:5], w[3:]], [other[:5], other[3:]], None, r"teacher\[0\] must .*, got one with teacher\[1\]"),
        ([w[:, :4], w[:, 3:]], [other[:, :4], other[:, 3:]], None, r"teacher\[0\] .* teacher\[1\]"),
        ([w[:5]], [w[1:6]], None, r"teacher\[0\] must not overlap in memory, got one with student\[0\]"),
        ([w[:4], w[4:]], [w[4:], other[4:]], None, r"teacher\[1\] .*student\[0\]"),
        ([w], [other], [torch.zeros(1).expand(8, 6)], r"copies\[0\] .*expanded"),
        ([w[:5]], [other[:5]], [w[1:6]], r"teacher\[0\] .*copies\[0\]"),
        ([w], [other], [w.view(torch.float16)[:, :6]], r"teacher\[0\] .*copies\[0\]|copies\[0\] .*teacher"),
        ([w[:4], w[4:]], [other[:4], other[4:]], [other[4:], None], r"copies\[0\] .*student\[1\]"),
        ([w, w], [other, other.clone()], None, r"teacher\[0\] .*teacher\[1\]"),
    ):
        before = w.clone(), other.clone()
        with pytest.raises(ValueError, match=f"ema: {words}"):
            ema_update_(teacher, student, 0.5, copies, backend=backend)
        assert torch.equal(w, before[0]) and torch.equal(other, before[1])


@on_all
def test_tied_weights_are_updated_once(backend: str) -> None:
    t, s, copies = memory(4, 3), memory(4, 3) * 5, [torch.zeros(4, 3) for _ in range(3)]
    expected = 0.25 * t + 0.75 * s
    teacher, student = [t, memory(2), t.view(4, 3), t], [s, memory(2), s, s[:]]
    ema_update_(teacher, student, 0.25, [copies[0], None, *copies[1:]], backend=backend)
    for result in (t, *copies):
        torch.testing.assert_close(result, expected)
    # what the student shares with itself is its own affair
    one, two = torch.zeros(4), torch.zeros(4)
    ema_update_([one, two], [s.view(-1)[:4]] * 2, 0.0, backend=backend)
    assert torch.equal(one, two) and torch.equal(one, s.view(-1)[:4])


@on_all
def test_what_may_share_memory(backend: str) -> None:
    w, other = memory(8, 6), memory(8, 6) * 3
    expected = 0.5 * w + 0.5 * other
    columns = [w[:, ::2], w[:, 1::2]]  # views that interleave have no element in common
    ema_update_(columns, [other[:, ::2], other[:, 1::2]], 0.5, backend=backend)
    torch.testing.assert_close(w, expected)
    ema_update_([w], [w], 0.5, [w], backend=backend)  # the average of a model and itself, element by element
    torch.testing.assert_close(w, expected)
    ema_update_([w], [other], 0.5, [other], backend=backend)  # the student becomes its average
    torch.testing.assert_close(other, w)
    empty = torch.zeros(0, 3)
    ema_update_([empty, empty, torch.zeros(0)], [empty, empty, torch.zeros(0)], 0.5, backend=backend)


class Overlapping(nn.Module):
    def __init__(self, *parts: slice) -> None:
        super().__init__()
        flat = memory(12)
        self.parts = nn.ParameterList(nn.Parameter(flat[part]) for part in parts)


@on_all
def test_modules(backend: str) -> None:
    model = Overlapping(slice(0, 6), slice(6, 12))
    average = EMA(model, 0.5, backend=backend)
    with torch.no_grad():
        model.parts[0].add_(2.0)
    average.update(model)
    torch.testing.assert_close(average.module.parts[0], memory(12)[:6] + 1.0)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    average = EMA(tied, 0.5, backend=backend)
    start = tied[0].weight.detach().clone()
    with torch.no_grad():
        tied[0].weight.add_(2.0)
    average.update(tied)
    torch.testing.assert_close(average.module[1].weight, start + 1.0)


def test_optimizer() -> None:
    params = [nn.Parameter(memory(4)), nn.Parameter(memory(4))]
    flat = memory(7)
    parts = [flat[:4], flat[3:]]
    halves = [part.half() for part in parts]
    for given, words in (
        ({"teacher": parts}, r"teacher\[0\] must not overlap in memory, got one with teacher\[1\]"),
        ({"teacher": [flat[:4], flat[:4]]}, r"teacher\[0\] .* teacher\[1\]"),
        ({"teacher": [params[0].detach(), flat[:4]]}, r"teacher\[0\] .* params\[0\]"),
        ({"teacher": [flat[:4], params[0].detach()]}, r"teacher\[1\] .* params\[0\]"),
        ({"copies": [halves[0], halves[0]]}, r"copies\[0\] .* copies\[1\]"),
        ({"teacher": [flat[:4], memory(4)], "copies": [None, flat[3:]]}, r"teacher\[0\] .* copies\[1\]"),
        (
            {"teacher": [flat[:4], memory(4)], "copies": halves, "teacher_copies": [halves[0], None]},
            r"copies\[0\] .* teacher_copies\[0\]",
        ),
    ):
        with pytest.raises(ValueError, match=f"adamw_ema: {words}"):
            AdamWEMA(params, teacher=given.pop("teacher", None), **given)
    AdamWEMA(params, teacher=[flat[:4], memory(4)], copies=halves)


def test_thousands_of_disjoint_views() -> None:
    flat = torch.zeros(40_000)
    check_memory("x", [("teacher", list(flat.split(10)))], [("student", [flat] * 0 or [None] * 4000)])


def test_tensors_without_memory_are_not_one() -> None:
    """On the meta device, where launches are recorded, all have the same address."""
    three = [torch.empty(2, 3, device="meta") for _ in range(3)]
    with OpTrace("meta") as trace:
        ema_update_(three, [torch.empty_like(t) for t in three], 0.5, backend="eager")
    assert trace.bytes == 3 * 3 * 24  # teacher read and written, student read
    with FakeTensorMode():
        fakes = [torch.empty(2, 3) for _ in range(4)]
        ema_update_(fakes[:2], fakes[2:], 0.5, backend="eager")
