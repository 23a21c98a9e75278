"""The compiled AdamW with teacher and copies: against eager and fp64, torch.optim.AdamW, and its own bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2vkern import AdamWEMA
from d2vkern._backend import BackendError
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.reference.adamw_ema import adamw_ema_ as eager
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

from .native_common import DTYPES, LEVELS, cpu_level, threads

from d2vkern.native.adamw_ema import adamw_ema_ as kernel  # isort: skip

BLOCK, GRAIN = 128, 16384
"""elements that csrc/adamw_ema.cpp works on at a time, and from which on it takes a second thread"""
SIZES = {
    "scalar": (),
    "one element": (1,),
    "nothing": (0, 3),
    "less than a vector": (3,),
    "prime": (61, 17),
    "bias": (768,),
    "a block and one": (BLOCK + 1,),
    "two threads": (GRAIN + 5,),
}
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
op = torch.ops.d2vkern_native.adamw_ema_


class State:
    """What one call works on: lists of tensors for `shapes`; teachers and copies in some rows only."""

    def __init__(self, shapes: list[tuple[int, ...]], low: torch.dtype = torch.float16) -> None:
        def draw() -> list[Tensor]:
            return [torch.randn(shape) for shape in shapes]

        def some(tensors: list[Tensor], every: int, dtype: torch.dtype) -> list[Tensor | None]:
            return [t.to(dtype) if i % every else None for i, t in enumerate(tensors, 1)]

        self.params, self.grads, self.exp_avgs = draw(), draw(), draw()
        self.exp_avg_sqs = [x.square() + m.square() for x, m in zip(draw(), self.exp_avgs, strict=True)]
        self.teachers, self.copies = some(draw(), 4, torch.float32), some(draw(), 3, low)
        self.teacher_copies = [
            None if t is None or i % 2 else t.to(low) for i, t in enumerate(self.teachers, 1)
        ]

    def written(self) -> dict[str, Tensor]:
        """Every tensor that a call may change, by name."""
        lists = {name: tensors for name, tensors in vars(self).items() if name != "grads"}
        return {f"{name}[{i}]": t for name in lists for i, t in enumerate(lists[name]) if t is not None}

    def clone(self, dtype: torch.dtype = torch.float32) -> State:
        """The same values, fp32 in `dtype`, contiguous: torch's fused AdamW for CPUs ignores strides."""
        twin = copy.deepcopy(self)
        for tensors in vars(twin).values():
            for i, x in enumerate(tensors):
                if x is not None:
                    tensors[i] = x.contiguous().to(dtype if x.dtype == torch.float32 else x.dtype)
        return twin

    def run(self, update: Callable[..., None], steps: float | list[Tensor], **settings: Any) -> None:
        given: dict[str, Any] = {"eps_mode": "torch", "clip_factor": None, "ema_decay": 0.9}
        given |= SETTINGS | settings
        with torch.no_grad():
            lists = dict(vars(self))
            first = [lists.pop(name) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")]
            update(*first, steps, **lists, **given)


def on_device(state: State, step: float) -> list[Tensor]:
    """The step as a capturable optimizer holds it."""
    return [torch.tensor(step) for _ in state.params]


def assert_parity(state: State, steps: float | list[Tensor], **settings: Any) -> None:
    """The op and eager from the same state: at most twice eager's error to fp64, gradients as they were,
    copies exactly the new values."""
    by_eager, exact, grads = state.clone(), state.clone(torch.float64), state.clone().grads
    by_eager.run(eager, steps, **settings)
    exact.run(eager, steps, **settings)
    state.run(kernel, steps, **settings)
    for name, ours in state.written().items():
        if "copies" not in name:
            assert_no_worse_than_eager(ours, by_eager.written()[name], exact.written()[name])
    for g, before in zip(state.grads, grads, strict=True):
        assert_bitwise_equal(g.contiguous(), before)
    pairs = list(zip(state.params, state.copies, strict=True))
    if settings.get("ema_decay", 0.9) is not None:
        pairs += zip(state.teachers, state.teacher_copies, strict=True)
    for source, low in pairs:
        if low is not None:
            assert_bitwise_equal(low, source.to(low.dtype))


def assert_same_bits(ours: State, theirs: State) -> None:
    for x, y in zip(ours.written().values(), theirs.written().values(), strict=True):
        assert_bitwise_equal(x, y)


def clones(tensors: list[Any]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, level: int) -> None:
    with cpu_level(level):
        assert_parity(State([SIZES[name]] * 2), 3.0)


@pytest.mark.parametrize("eps_mode", ["torch", "fairseq"])
@pytest.mark.parametrize("step", [1.0, 2.0, 1e6])
@pytest.mark.parametrize("settings", [{}, {"eps": 1e-8, "weight_decay": 0.0}, {"betas": (0.0, 0.0)}], ids=str)
def test_settings_on_host_and_device(settings: dict[str, Any], step: float, eps_mode: str) -> None:
    """Numbers, and the same as tensors: the same bits."""
    state = State([(97,), (5,), (3, 4), (1,)], torch.bfloat16)
    twin = state.clone()
    assert_parity(state, step, eps_mode=eps_mode, clip_factor=0.7, **settings)
    as_tensors = {
        "clip_factor": torch.tensor(0.7, dtype=torch.float64),
        "ema_decay": torch.tensor(0.9, dtype=torch.float64),
    }
    lr = torch.tensor(SETTINGS["lr"], dtype=torch.float64)
    twin.run(kernel, on_device(twin, step), eps_mode=eps_mode, **settings | {"lr": lr}, **as_tensors)
    assert_same_bits(state, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_any_dtype(dtype: torch.dtype) -> None:
    state, twin = State([(700,), (9,)]), None
    state.grads = [g.to(dtype) for g in state.grads]
    twin = state.clone()
    twin.grads = [g.float() for g in state.grads]
    state.run(kernel, 2.0)
    twin.run(kernel, 2.0)
    assert_same_bits(state, twin)


def test_without_teachers_decay_or_copies() -> None:
    state = State([(33,), (5,)])
    before = state.clone()
    state.run(kernel, 1.0, ema_decay=None)
    for name in ("teachers", "teacher_copies"):
        for ours, original in zip(getattr(state, name), getattr(before, name), strict=True):
            assert_bitwise_equal(ours, original) if ours is not None else None
    state.copies, state.teachers, state.teacher_copies = [None] * 2, [None] * 2, [None] * 2
    assert_parity(state, 2.0)


def test_found_inf_writes_nothing() -> None:
    state = State([(600,), (5,)])
    before = state.clone()
    state.grads[0].fill_(float("nan"))
    state.run(
        kernel, on_device(state, 0.0), found_inf=torch.tensor(1.0), clip_factor=torch.tensor(float("nan"))
    )
    assert_same_bits(state, before)
    state.grads[0].fill_(1.0)
    twin = state.clone()
    state.run(kernel, on_device(state, 1.0), found_inf=torch.tensor(0.0))
    twin.run(kernel, on_device(twin, 1.0))
    assert_same_bits(state, twin)


def test_no_gradient_and_no_eps_is_not_a_number_as_in_torch() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    AdamWEMA([p], 0.1, eps=0.0, backend="native").step()
    assert p.isnan().all()


def test_threads_and_instruction_sets_change_no_bit() -> None:
    start = State([(3,), (2 * GRAIN + 5,), (1,), (3 * GRAIN,)])
    results = []
    for count in (1, 2):
        for level in LEVELS:
            state = start.clone()
            with threads(count), cpu_level(level):
                state.run(kernel, 5.0, clip_factor=0.3)
            results.append(state)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("low", DTYPES, ids=str)
def test_copies_that_are_written_past_the_caches(low: torch.dtype) -> None:
    """32 MB and more of them, in rows that begin and end between vectors."""
    count = 2**24 + 37
    state = State([(count,), (3,), (1,)])
    state.copies = [torch.empty(count, dtype=low), torch.empty(4, dtype=low)[1:], None]
    state.teachers = [torch.randn(count), torch.randn(3), torch.randn(1)]
    state.teacher_copies = [torch.empty(count + 1, dtype=low)[1:], None, torch.empty(1, dtype=low)]
    state.run(kernel, 3.0)
    for written, source in ((state.copies, state.params), (state.teacher_copies, state.teachers)):
        for copied, x in zip(written, source, strict=True):
            if copied is not None and x is not None:
                assert_bitwise_equal(copied, x.to(low))


def test_layouts() -> None:
    """Dense ones are walked in memory order; rows of several are copied there and back."""
    state = State([(12, 10), (12, 10), (12, 10)])
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "teachers", "copies", "teacher_copies"):
        tensors = getattr(state, name)
        for i in (1, 2):
            if tensors[i] is not None and (i == 1 or name in ("params", "grads", "copies")):
                tensors[i] = tensors[i].t().contiguous().t()
    assert not state.params[1].is_contiguous() and state.exp_avgs[2].is_contiguous()
    assert_parity(state, 2.0)
    memory = torch.randn(24, 10)
    state, kept = State([(12, 10)]), memory.clone()
    state.params[0] = memory[::2]
    assert_parity(state, 2.0)
    assert_bitwise_equal(memory[1::2], kept[1::2])


def test_versions_and_auto() -> None:
    p = nn.Parameter(torch.randn(4))
    teacher, low = p.detach().clone(), torch.zeros(4).half()
    optimizer = AdamWEMA([p], 0.1, teacher=[teacher], copies=[low])
    p.grad = torch.randn(4)
    with backend_spy() as calls:
        optimizer.step(ema_decay=0.9)
    assert calls == [("adamw_ema", "native")]
    state = optimizer.state[p]
    versions = [t._version for t in (p, teacher, low, state["exp_avg"], state["exp_avg_sq"], p.grad)]
    assert versions[:3] == [1, 1, 1] and versions[3:] == [1, 1, 0]


def test_matches_torch_adamw_over_many_steps() -> None:
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), (33, 17))]
    theirs = [nn.Parameter(p) for p in clones(ours)]
    groups = [{"params": ours[:1], "weight_decay": 0.0, "lr": 0.02}, {"params": ours[1:]}]
    optimizer = AdamWEMA(groups, 0.01, (0.9, 0.98), 1e-6, 0.1, backend="native")
    oracle = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.0, "lr": 0.02}, {"params": theirs[1:]}],
        0.01,
        (0.9, 0.98),
        1e-6,
        0.1,
    )
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(BackendError, match="fp64 tensors run on eager only"):
        AdamWEMA([p], backend="native").step()
    state = State([(4,), (4,)])

    def call(**changed: Any) -> None:
        given = {name: tensors for name, tensors in vars(state).items()} | changed
        present = {name: [t for t in given[name] if t is not None] for name in given}
        rows = {name: [i for i, t in enumerate(given[name]) if t is not None] for name in given}
        op(
            present["params"], present["grads"], present["exp_avgs"], present["exp_avg_sqs"],
            present["teachers"], rows["teachers"], present["copies"], rows["copies"],
            present["teacher_copies"], rows["teacher_copies"], None, None, None, None, None,
            1.0, 0.9, 1.0, 0.1, 0.9, 0.98, 1e-6, 0.1, False,
        )  # fmt: skip

    twice = [state.params[0], state.params[0]]
    for changed, words in (
        ({"params": twice}, "adamw_ema: params must not hold the same memory twice"),
        ({"exp_avgs": [torch.zeros(4).half()] * 2}, r"exp_avgs\[0\] must be fp32 on backend 'native'"),
        ({"grads": [torch.zeros(4), torch.zeros(5)]}, r"grads\[1\] must have shape \(4\) like .*, got \(5\)"),
        ({"grads": [torch.zeros(4)]}, "adamw_ema: grads must have 2 tensors, got 1"),
        ({"teachers": [None, None]}, "adamw_ema: teacher_copies must belong to teachers, got one in row"),
    ):
        before = state.clone()
        with pytest.raises(ValueError, match=words):
            call(**changed)
        assert_same_bits(state, before)
    call()


def test_range_and_work() -> None:
    totals = {}
    for backend in ("native", "eager"):
        p = nn.Parameter(torch.randn(10))
        p.grad = torch.randn(10)
        optimizer = AdamWEMA([p], 0.1, teacher=clones([p]), copies=[torch.zeros(10).half()], backend=backend)
        with force_ranges(True), tally_costs() as tallies:
            optimizer.step(ema_decay=0.9)
        totals[backend] = {name: tally.bytes for name, tally in tallies.items()}
    assert totals["native"] == {"adamw_ema/fwd/native": totals["eager"]["adamw_ema/fwd/eager"]}


def test_opcheck() -> None:
    state = State([(7,), (3,), (2, 2)])
    present = [[t for t in getattr(state, name) if t is not None] for name in ("teachers", "copies")]
    for tensors in (
        (None,) * 5,
        (torch.tensor(0.0), torch.tensor(0.5), None, torch.tensor(2.0), torch.tensor(0.1)),
    ):
        torch.library.opcheck(
            op.default,
            (
                state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, present[0], [0, 1, 2],
                present[1], [0, 1], [torch.zeros(3).half()], [1], *tensors,
                1.0, 0.9, 1.0, 0.1, 0.9, 0.98, 1e-6, 0.1, True,
            ),
        )  # fmt: skip


def test_a_compiled_step_equals_an_uncompiled_one() -> None:
    weights = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5, 3))
        teacher = weight.detach().clone()
        optimizer = AdamWEMA([weight], lr=0.1, teacher=[teacher], capturable=True, backend="native")
        weight.grad = torch.randn(5, 3)
        step = wrap(optimizer.step)
        for _ in range(2):
            step(ema_decay=0.9)
        weights.append((weight.detach(), teacher))
    torch._dynamo.reset()
    for compiled, plain in zip(*weights, strict=True):
        assert_bitwise_equal(compiled, plain)
