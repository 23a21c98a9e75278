"""The compiled moving average against eager and fp64: sizes, dtypes, layouts, threads, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from d2vkern import EMA, ema_update_
from d2vkern._backend import BackendError
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.reference.ema import ema_update_ as eager
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

from .native_common import DTYPES, LEVELS, cpu_level, threads

BLOCK, GRAIN = 1024, 16384
"""elements that csrc/ema.cpp works on at a time, and from which on it takes a second thread"""
SIZES = {
    "scalar": (),
    "one element": (1,),
    "nothing": (0, 3),
    "less than a vector": (3,),
    "a vector and one": (9,),
    "prime": (61, 17),
    "bias": (768,),
    "a block": (BLOCK,),
    "a block and one": (BLOCK + 1,),
    "two threads, the last block short": (3, GRAIN // 2 + 7),
}
op = torch.ops.d2vkern_native.ema_update_


def native(*arguments: object) -> None:
    ema_update_(*arguments, backend="native")


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def assert_parity(
    teacher: list[Tensor],
    student: list[Tensor],
    decay: float | Tensor,
    copies: list[Tensor | None] | None = None,
    update: Callable[..., None] = native,
) -> None:
    """The op and eager from the same start: at most twice eager's error to fp64, students as they were,
    copies exactly the new teachers."""
    copies = [None] * len(teacher) if copies is None else copies
    by_eager, before = clones(teacher), clones(student)
    exact = [t.double() for t in teacher]
    eager(by_eager, student, decay, [None] * len(teacher))
    eager(exact, student, decay, [None] * len(teacher))
    update(teacher, student, decay, copies)
    for ours, theirs, reference in zip(teacher, by_eager, exact, strict=True):
        assert_no_worse_than_eager(ours, theirs, reference)
    for s, original in zip(student, before, strict=True):
        assert_bitwise_equal(s.detach(), original)
    for t, low in zip(teacher, copies, strict=True):
        if low is not None:
            assert_bitwise_equal(low, t.to(low.dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, dtype: torch.dtype, level: int) -> None:
    shape = SIZES[name]
    with cpu_level(level):
        for copy_dtype in DTYPES:
            copy = torch.zeros(shape, dtype=copy_dtype)
            assert_parity([torch.randn(shape)], [torch.randn(shape).to(dtype)], 0.9, [copy])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9998, 0.99999])
def test_decays(decay: float) -> None:
    start, student = [torch.randn(1000)], [torch.randn(1000)]
    results = []
    for given in (decay, torch.tensor(decay, dtype=torch.float64)):
        teacher = clones(start)
        assert_parity(teacher, student, given)
        results.append(teacher[0])
    assert_bitwise_equal(results[0], results[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decay_tensor_counts_as_what_it_holds(dtype: torch.dtype) -> None:
    assert_parity([torch.randn(37)], [torch.randn(37)], torch.tensor(0.99, dtype=dtype))


def test_three_hundred_tensors_of_mixed_dtypes_in_one_call() -> None:
    sizes = [(7 * i) % 83 for i in range(298)] + [BLOCK + 3, 2 * GRAIN + 5]
    teacher = [torch.randn(n) for n in sizes]
    student = [torch.randn(n).to(DTYPES[i % 3]) for i, n in enumerate(sizes)]
    low = [None, *DTYPES]
    copies = [
        None if dtype is None else torch.zeros(n, dtype=dtype)
        for n, dtype in zip(sizes, low * 75, strict=True)
    ]
    with backend_spy() as calls:
        assert_parity(teacher, student, 0.9, copies)
    assert calls == [("ema", "native")]


def test_threads_and_instruction_sets_change_no_bit() -> None:
    sizes = [3, 2 * GRAIN + 5, 1, 3 * GRAIN]
    start, student = [torch.randn(n) for n in sizes], [torch.randn(n).bfloat16() for n in sizes]
    results = []
    for count in (1, 2):
        for level in LEVELS:
            teacher, copies = clones(start), [torch.zeros(n).half() for n in sizes]
            with threads(count), cpu_level(level):
                native(teacher, student, 0.9998, copies)
            results.append([*teacher, *copies])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_conversions_of_every_kind_of_number(dtype: torch.dtype, level: int) -> None:
    """Reading all 65536 bit patterns, and rounding to them, as torch does."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    halfway = (patterns.float() + patterns.roll(-1).float()) / 2
    any_bits = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), dtype=torch.int32).view(torch.float32)
    extremes = torch.tensor([0.0, -0.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 2.0**-14])
    source = torch.cat([halfway, any_bits, extremes, torch.randn(5000) * 1e-6])
    with cpu_level(level):
        read = torch.zeros(1 << 16)
        native([read], [patterns], 0.0)
        copy, teacher = torch.empty(len(source), dtype=dtype), source.clone()
        native([teacher], [source], 0.5, [copy])
    # with a decay of 0 the teacher is s - 0 * (s - t), as in torch.lerp
    number = patterns.float().isfinite()
    assert_bitwise_equal(read[number] + 0.0, patterns.float()[number] + 0.0)
    assert read[~number].isnan().all()
    number = ~teacher.isnan()
    assert number.sum() > 100_000
    assert_bitwise_equal(copy[number], teacher.to(dtype)[number])
    assert copy[~number].isnan().all()


@pytest.mark.parametrize("low", DTYPES, ids=str)
def test_copies_that_are_written_past_the_caches(low: torch.dtype) -> None:
    """32 MB and more of them, from a vector's start and from between two."""
    count = 2**24 + 37
    teacher, student = [torch.randn(count), torch.randn(5)], [torch.randn(count), torch.randn(5)]
    expected = [torch.lerp(t, s, 0.25) for t, s in zip(teacher, student, strict=True)]
    copies = [torch.empty(count, dtype=low), torch.empty(6, dtype=low)[1:]]
    native(teacher, student, 0.75, copies)
    for t, copied, should in zip(teacher, copies, expected, strict=True):
        torch.testing.assert_close(t, should)
        assert_bitwise_equal(copied, t.to(low))


def test_layouts() -> None:
    """Dense ones are walked in memory order; others are copied there and back."""
    other = torch.randn(6, 4)
    assert_parity([torch.randn(4, 6).t()], [torch.randn(4, 6).t()], 0.8)
    assert_parity([torch.randn(4, 6).t()], [other], 0.8, [torch.zeros(6, 4).half()])
    assert_parity([other.clone()], [torch.randn(4, 6).t()], 0.8, [torch.zeros(4, 6).half().t()])
    memory = torch.randn(12, 8)
    kept = memory.clone()
    assert_parity([memory[::2, ::2]], [torch.randn(6, 4).bfloat16()], 0.8)
    assert_bitwise_equal(memory[1::2], kept[1::2])
    assert_bitwise_equal(memory[:, 1::2], kept[:, 1::2])
    assert_parity(
        [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)], [torch.randn(2, 3, 4, 5)], 0.8
    )


def test_parameters_that_want_gradients_and_their_versions() -> None:
    teacher, student = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    copy = torch.zeros(5).half()
    native([teacher], [student], 0.5, [copy])
    assert (teacher._version, student._version, copy._version) == (1, 0, 1)
    x = torch.randn(5, requires_grad=True)
    average = torch.randn(5)
    y = (x * average).sum()
    native([average], [torch.randn(5)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_the_module_and_auto_take_it() -> None:
    model = nn.Linear(7, 5)
    ours, theirs = EMA(model, 0.9), EMA(model, 0.9, backend="eager")
    with torch.no_grad():
        model.weight.add_(1.0)
    with backend_spy() as calls:
        ours.update(model)
    theirs.update(model)
    assert calls == [("ema", "native")]
    torch.testing.assert_close(ours.module.weight, theirs.module.weight, rtol=1e-6, atol=1e-7)


def test_empty_lists_and_fp64() -> None:
    native([], [], 0.9)
    with pytest.raises(BackendError, match="fp64 tensors run on eager only"):
        native([torch.zeros(2, dtype=torch.float64)], [torch.zeros(2)], 0.9)
    with backend_spy() as calls:
        ema_update_([torch.zeros(2, dtype=torch.float64)], [torch.zeros(2)], 0.9)
    assert calls == [("ema", "eager")]


def test_refusals_of_the_registered_op() -> None:
    """The public function checks before; these keep a direct call from reading wild memory."""
    one, two = torch.zeros(2), torch.zeros(3)
    for arguments, words in (
        (([one], [one, one], [], [], 0.9, None), "ema: student must have 1 tensors, got 2"),
        (([one], [two], [], [], 0.9, None), r"ema: student\[0\] must have shape \(2\) like .*, got \(3\)"),
        (([one], [one], [one], [1], 0.9, None), "ema: copies must have at most one tensor in each of 1 rows"),
        (([one], [one], [one, one], [0, 0], 0.9, None), "ema: copies must have at most one tensor in each"),
        (([one, two], [one, two], [one], [0, 1], 0.9, None), "ema: copies must have 2 tensors, got 1"),
        (([one.half()], [one], [], [], 0.9, None), r"ema: teacher\[0\] must be fp32 on backend 'native'"),
        (([one], [one.long()], [], [], 0.9, None), r"ema: student\[0\] must be fp32, fp16 or bf16"),
        (
            ([one, one], [two[:2], two[:2]], [], [], 0.9, None),
            "ema: teacher must not hold the same memory twice",
        ),
        (([one], [one], [], [], 0.9, torch.zeros(2)), "ema: decay must be a number of the CPU, got 2 values"),
        (([one], [one], [], [], 0.9, torch.tensor(True)), "ema: decay must be floating or int64, got Bool"),
    ):
        with pytest.raises(ValueError, match=words):
            op(*arguments)
    assert torch.equal(one, torch.zeros(2))


def test_range_and_work() -> None:
    with force_ranges(True), tally_costs() as tallies:
        native([torch.zeros(6)], [torch.zeros(6).half()], 0.9, [torch.zeros(6).bfloat16()])
    assert {name: tally.bytes for name, tally in tallies.items()} == {"ema/fwd/native": 72}


def test_opcheck() -> None:
    copies = [torch.zeros(7).half()]
    arguments = ([torch.randn(7), torch.randn(3)], [torch.randn(7).half(), torch.randn(3)], copies, [0])
    torch.library.opcheck(op.default, (*arguments, 0.9, None))
    torch.library.opcheck(op.default, (*arguments, 0.0, torch.tensor(0.9, dtype=torch.float64)))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph(compiler: str) -> None:
    start, student = [torch.randn(7), torch.randn(3)], [torch.randn(7).bfloat16(), torch.randn(3)]
    teacher, twins = clones(start), clones(start)
    copies, low = [torch.zeros(7).half(), None], [torch.zeros(7).half(), None]
    torch._dynamo.reset()
    with backend_spy() as calls:
        torch.compile(native, fullgraph=True, backend=compiler)(teacher, student, 0.9, copies)
    native(twins, student, 0.9, low)
    assert set(calls) == {("ema", "native")}
    for a, b in zip([*teacher, copies[0]], [*twins, low[0]], strict=True):
        assert_bitwise_equal(a, b)
