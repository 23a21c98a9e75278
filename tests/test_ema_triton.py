"""The Triton moving average against eager and fp64: sizes, dtypes, layouts, and when a new table is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from d2vkern import EMA, ema_update_
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.reference.ema import ema_update_ as eager
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from d2vkern.kernels import _table
from d2vkern.kernels._launch import Launch, record_launches
from d2vkern.kernels.ema import ema_update_ as kernel

CHUNK = 8192
FP32, FP16 = torch.float32, torch.float16
SIZES = {
    "scalar": (),
    "one element": (1,),
    "nothing": (0, 3),
    "less than a vector": (3,),
    "a vector": (4,),
    "prime": (61, 17),
    "bias": (768,),
    "one chunk": (CHUNK,),
    "one chunk and one": (CHUNK + 1,),
    "two chunks, the last short": (4, 2567),
}


@pytest.fixture(autouse=True)
def no_tables() -> None:
    _table.tables.clear()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Receives the number of rows of every table that is made."""
    made: list[int] = []

    def build(columns, *more):
        made.append(len(columns[0].tensors))
        return original(columns, *more)

    original = _table._build
    monkeypatch.setattr(_table, "_build", build)
    return made


def values(device: torch.device, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def all_sizes(device: torch.device, dtype: torch.dtype = FP32) -> list[Tensor]:
    return [values(device, *shape, dtype=dtype) for shape in SIZES.values()]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides and start within 16 bytes."""
    return [t.clone() for t in tensors]


def assert_parity(
    update: Callable[..., None],
    teacher: list[Tensor],
    student: list[Tensor],
    decay: float | Tensor,
    copies: list[Tensor | None] | None = None,
) -> list[Launch]:
    """`update` and eager from the same start: at most twice eager's error to fp64, students as they were, the
    copies exactly the new teachers. Returns what was launched."""
    copies = [None] * len(teacher) if copies is None else copies
    by_eager, before = clones(teacher), clones(student)
    exact = [t.double() for t in teacher]
    eager(by_eager, student, decay, [None] * len(teacher))
    eager(exact, student, decay, [None] * len(teacher))
    with record_launches() as launches:
        update(teacher, student, decay, copies)
    for ours, theirs, reference in zip(teacher, by_eager, exact, strict=True):
        assert_no_worse_than_eager(ours, theirs, reference)
    for s, original in zip(student, before, strict=True):
        assert_bitwise_equal(s.detach(), original)
    for t, low in zip(teacher, copies, strict=True):
        if low is not None:
            assert_bitwise_equal(low, t.to(low.dtype))
    return launches


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(triton_device: torch.device, name: str, dtype: torch.dtype) -> None:
    shape = SIZES[name]
    teacher, student = [values(triton_device, *shape)], [values(triton_device, *shape, dtype=dtype)]
    assert_parity(kernel, teacher, student, 0.9, [torch.zeros(shape, dtype=FP16, device=triton_device)])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9998, 0.99999])
def test_decays(triton_device: torch.device, decay: float) -> None:
    as_tensor = torch.tensor(decay, dtype=torch.float64, device=triton_device)
    start, student = all_sizes(triton_device), all_sizes(triton_device)
    results = []
    for given in (decay, as_tensor):
        teacher = clones(start)
        assert_parity(kernel, teacher, student, given)
        results.append(teacher)
    for number, tensor in zip(*results, strict=True):
        assert_bitwise_equal(tensor, number)


def test_fp32_decay_tensor_counts_as_what_it_holds(triton_device: torch.device) -> None:
    teacher, student = [values(triton_device, 37)], [values(triton_device, 37)]
    assert_parity(kernel, teacher, student, torch.tensor(0.99, device=triton_device))


def test_three_hundred_tensors_of_mixed_dtypes_in_one_launch(triton_device: torch.device) -> None:
    sizes = [(7 * i) % 83 for i in range(298)] + [CHUNK + 3, 2 * CHUNK]
    teacher = [values(triton_device, n) for n in sizes]
    student = [values(triton_device, n, dtype=FP16 if i % 3 else FP32) for i, n in enumerate(sizes)]
    low = [None, FP16, FP32, FP16]
    copies = [
        None if dtype is None else torch.zeros(n, dtype=dtype, device=triton_device)
        for n, dtype in zip(sizes, low * 75, strict=True)
    ]
    with backend_spy() as calls:
        launches = assert_parity(
            lambda *args: ema_update_(*args, backend="triton"), teacher, student, 0.9, copies
        )
    assert calls == [("ema", "triton")]
    assert [launch.grid for launch in launches] == [(sum(n > 0 for n in sizes) + 2,)]
    assert len(launches[0].constexprs["KINDS"]) == 6


@pytest.mark.parametrize(
    "offsets", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 2, 4), (4, 4, 4), (3, 1, 2)], ids=str
)
def test_misaligned_views_and_their_neighbours(triton_device: torch.device, offsets: tuple[int, ...]) -> None:
    size = 1031
    memory = [values(triton_device, size + 8, dtype=dtype) for dtype in (FP32, FP16, FP16)]
    before = clones(memory)
    teacher, student, copy = (x[at : at + size] for x, at in zip(memory, offsets, strict=True))
    assert_parity(kernel, [teacher], [student], 0.75, [copy])
    for x, original, at in zip(memory, before, offsets, strict=True):
        assert_bitwise_equal(x[:at], original[:at])
        assert_bitwise_equal(x[at + size :], original[at + size :])


def test_only_tensors_at_multiples_of_four_elements_count_as_aligned(triton_device: torch.device) -> None:
    # The interpreter does not mind a misaligned vector, a GPU does.
    memory, low = (values(triton_device, 64, dtype=dtype) for dtype in (FP32, FP16))
    assert memory.data_ptr() % 16 == low.data_ptr() % 16 == 0
    starts = [(0, 0), (4, 8), (0, 4), (2, 0), (1, 4), (0, 2), (8, 1)]
    columns = [
        _table.Column("teacher", [memory[start : start + 9] for start, _ in starts]),
        _table.Column("student", [low[start : start + 9] for _, start in starts]),
    ]
    with _table.table_of("ema", columns, CHUNK) as table:
        records = table.staged[table.programs :].view(len(starts), 3 + len(columns))
    assert records[:, 2].tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_layouts(triton_device: torch.device) -> None:
    # A dense layout that the row shares is walked in place; what strays from it goes through a copy.
    def permuted(dtype: torch.dtype = FP32) -> Tensor:
        return values(triton_device, 5, 1, 7, 3, dtype=dtype).permute(3, 1, 0, 2)

    teacher = [permuted(), permuted(), values(triton_device, 16, 3)[::2], values(triton_device, 6, 4)]
    student = [permuted(FP16), values(triton_device, 3, 1, 5, 7), values(triton_device, 8, 3)]
    student.append(values(triton_device, 4).expand(6, 4))
    copies: list[Tensor | None] = [permuted(FP16), permuted(), None, values(triton_device, 4, 6).t()]
    gaps = teacher[2]._base[1::2].clone()
    assert_parity(kernel, teacher, student, 0.25, copies)
    assert_bitwise_equal(teacher[2]._base[1::2], gaps)


def test_a_shared_layout_is_not_copied(triton_device: torch.device) -> None:
    columns = [
        _table.Column(name, [values(triton_device, 6, 4).t(), values(triton_device, 3)])
        for name in ("teacher", "student")
    ]
    assert _table._one_layout_per_row(columns) == (columns, [])


def test_the_table_is_made_once(triton_device: torch.device, builds: list[int]) -> None:
    teacher, student = [values(triton_device, 5)], [values(triton_device, 5)]
    for decay in (0.9, 0.8, 0.7):
        kernel(teacher, student, decay, [None])
    assert builds == [1]
    other = [values(triton_device, 5)]
    for _ in range(2):
        kernel(teacher, other, 0.9, [None])
        kernel(teacher, student, 0.9, [None])
    assert builds == [1, 1]


@pytest.mark.parametrize("change", ["address", "size", "dtype", "copies"])
def test_a_change_makes_a_new_table(triton_device: torch.device, builds: list[int], change: str) -> None:
    memory = torch.zeros(64, device=triton_device)
    teacher, student = [values(triton_device, 8)], [memory[:8]]
    copies: list[Tensor | None] = [None]
    kernel(teacher, student, 0.9, copies)
    if change == "address":
        student[0].data = values(triton_device, 8)
    elif change == "size":
        teacher, student = [teacher[0][:4]], [memory[:4]]
    elif change == "dtype":
        memory.view(FP16).fill_(0.5)
        student = [memory.view(FP16)[:8]]
    else:
        copies = [torch.zeros(8, device=triton_device)]
    assert_parity(kernel, teacher, student, 0.9, copies)
    assert builds == [1, 1]


def test_tables_do_not_pile_up(triton_device: torch.device) -> None:
    for size in range(1, 2 * _table._CACHED_TABLES):
        kernel([values(triton_device, size)], [values(triton_device, size)], 0.9, [None])
    assert len(_table.tables) == _table._CACHED_TABLES


@pytest.mark.parametrize("known", [True, False], ids=["made before capture", "made during capture"])
def test_what_graphs_read_goes_with_what_they_write(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_memory: list[tuple[int, int]] = []
    monkeypatch.setattr(_table, "_captured", {})
    monkeypatch.setattr(_table, "_graphs_memory", lambda: graphs_memory)
    cpu = torch.device("cpu")

    def capture(teacher: Tensor, student: Tensor) -> None:
        if known:
            kernel([teacher], [student], 0.9, [None])
        with monkeypatch.context() as context:
            context.setattr(_table, "_is_captured", lambda device: True)
            kernel([teacher], [student], 0.9, [None])

    def others() -> None:
        for size in range(1, 2 * _table._CACHED_TABLES):
            kernel([values(cpu, size)], [values(cpu, size)], 0.9, [None])

    teacher = values(cpu, 300)
    for _ in range(3):
        capture(teacher[:200], values(cpu, 200))  # a view, whose memory stays
        others()
        assert len(_table._captured) >= 1
    del teacher
    others()
    assert len(_table._captured) == 0
    # What lies in a graph's own memory may be gone while the graph still writes it.
    inner = values(cpu, 40)
    graphs_memory.append((inner.data_ptr(), inner.data_ptr() + 160))
    capture(inner, values(cpu, 40))
    del inner
    others()
    assert len(_table._captured) == 1


@pytest.mark.gpu
def test_graphs_that_are_gone_leave_nothing(triton_device: torch.device) -> None:
    torch.cuda.synchronize()
    before = len(_table._captured)
    for size in range(1, 6):
        teacher, student, none = all_sizes(triton_device), all_sizes(triton_device), [None] * len(SIZES)
        kernel(teacher, student, 0.5, none)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernel(teacher, student, 0.5, none)
            kernel(teacher[:size], student[:size], 0.5, none[:size])
        graph.replay()
        assert len(_table._captured) > before
        del graph, teacher, student
    kernel([values(triton_device, 3)], [values(triton_device, 3)], 0.5, [None])
    assert len(_table._captured) == before


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_nan_and_infinity_go_where_eager_puts_them(triton_device: torch.device) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45], device=triton_device)
    teacher, student = odd.repeat(6), odd.repeat_interleave(6)
    for decay in (0.2, 0.8):
        ours, theirs = [teacher.clone()], [teacher.clone()]
        kernel(ours, [student], decay, [None])
        eager(theirs, [student], decay, [None])
        assert torch.equal(ours[0].isnan(), theirs[0].isnan())
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)


@pytest.mark.usefixtures("poisoned_empty")
def test_repeats_bitwise_with_poisoned_memory(triton_device: torch.device) -> None:
    start, student = all_sizes(triton_device), all_sizes(triton_device, FP16)
    start.append(values(triton_device, 6, 5).t())
    student.append(values(triton_device, 5, 6))
    results = []
    for _ in range(2):
        _table.tables.clear()
        results.append(clones(start))
        kernel(results[-1], student, 0.99, [None] * len(start))
    for first, second in zip(*results, strict=True):
        assert_bitwise_equal(first, second)
        assert first.isfinite().all()


def test_written_tensors_count_as_changed(triton_device: torch.device) -> None:
    teacher, copy = values(triton_device, 4), values(triton_device, 4)
    student = nn.Parameter(values(triton_device, 4))
    x = values(triton_device, 4).requires_grad_()
    y = (x * teacher).sum()
    ema_update_([teacher], [student], 0.9, [copy], backend="triton")
    assert (teacher._version, copy._version, student._version) == (1, 1, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        ema_update_([torch.zeros(2, device=triton_device)], [student[:2]], 0.9, backend="triton")


def test_refusals(triton_device: torch.device) -> None:
    one = values(triton_device, 2)
    with pytest.raises(ValueError, match=r"ema: backend 'triton', .* fp64 tensors run on eager only"):
        ema_update_([one.double()], [one], 0.9, backend="triton")
    with pytest.raises(
        ValueError, match=r"ema: student\[1\] must be fp32.*eager takes more\), got .*float64"
    ):
        kernel([one, one.clone()], [one, one.double()], 0.9, [None, None])
    columns = [_table.Column("teacher", [one]), _table.Column("copies", [one.to("meta")], [0])]
    with (
        pytest.raises(ValueError, match=r"ema: copies\[0\] must be on .* like the others, got meta"),
        _table.table_of("ema", columns, CHUNK),
    ):
        pass
    with pytest.raises(ValueError, match="ema: teacher must not hold the same memory twice"):
        kernel([one, one], [one.clone(), one.clone()], 0.9, [None, None])
    if triton_device.type == "cpu":
        with pytest.raises(ValueError, match=r"student\[0\] must be fp32 or fp16 in Triton's interpreter"):
            kernel([one], [one.bfloat16()], 0.9, [None])


def test_meta_tensors_are_recorded_with_their_programs() -> None:
    teacher, student = ([torch.empty(shape, device="meta") for shape in SIZES.values()] for _ in range(2))
    with record_launches() as launches:
        kernel(teacher, student, 0.9, [None] * len(SIZES))
    assert [launch.grid for launch in launches] == [(len(SIZES) - 1 + 2,)]


def test_range_names_bytes(triton_device: torch.device) -> None:
    with force_ranges(True), tally_costs() as tallies:
        kernel([values(triton_device, 5)], [values(triton_device, 5, dtype=FP16)], 0.9, [None])
    assert {name: tally.bytes for name, tally in tallies.items()} == {"ema/fwd/triton": 5 * (4 + 4 + 2)}


def test_opcheck(triton_device: torch.device) -> None:
    teacher = [values(triton_device, 5), values(triton_device, 4, 3).t()]
    student = [values(triton_device, 5), values(triton_device, 3, 4)]
    copies = [values(triton_device, 3, 4, dtype=FP16)]
    decay = torch.tensor(0.5, device=triton_device)
    for number, tensor in ((0.9, None), (0.0, decay)):
        args = (teacher, student, copies, [1], number, tensor)
        torch.library.opcheck(torch.ops.d2vkern.ema_update_.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(triton_device: torch.device, dynamic: bool) -> None:
    def step(teacher: Tensor, student: Tensor, decay: float | Tensor) -> tuple[Tensor, Tensor]:
        averaged, copy = teacher * 1, torch.zeros_like(teacher, dtype=FP16)
        ema_update_([averaged], [student], decay, [copy], backend="triton")
        return averaged + 0, copy

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (13, 18, 29) if dynamic else (13,):
            inputs = values(triton_device, size), values(triton_device, size, dtype=FP16)
            decay = torch.tensor(0.9, dtype=torch.float64, device=triton_device)
            for ours, theirs in zip(compiled(*inputs, decay), step(*inputs, decay), strict=True):
                assert_bitwise_equal(ours, theirs)
    torch._dynamo.reset()


def test_module_follows_eager(triton_device: torch.device) -> None:
    student = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(triton_device)
    ours, theirs = (
        EMA(student, 0.9, end_decay=0.99, anneal=4, backend=backend) for backend in ("triton", "eager")
    )
    with backend_spy() as calls:
        for step in range(1, 7):
            with torch.no_grad():
                for p in student.parameters():
                    p.add_(torch.randn_like(p))
            ours.update(student, step)
            theirs.update(student, step)
    assert calls == [("ema", "triton"), ("ema", "eager")] * 6
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_bf16(triton_device: torch.device) -> None:
    teacher, student = all_sizes(triton_device), all_sizes(triton_device, torch.bfloat16)
    copies: list[Tensor | None] = [torch.zeros_like(s) for s in student]
    assert_parity(kernel, teacher, student, 0.999, copies)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31(triton_device: torch.device) -> None:
    size = 2**31 + 7
    teacher = torch.zeros(size, device=triton_device)
    student = torch.ones(size, device=triton_device, dtype=torch.bfloat16)
    kernel([teacher], [student], 0.75, [None])
    assert (teacher == 0.25).all()


@pytest.mark.gpu
@pytest.mark.parametrize("table", ["made before capture", "made during capture"])
def test_cuda_graph(triton_device: torch.device, table: str) -> None:
    teacher, student = all_sizes(triton_device), all_sizes(triton_device)
    start, none = clones(teacher), [None] * len(teacher)
    decay = torch.tensor(0.5, dtype=torch.float64, device=triton_device)
    # Compiles the kernel in any case.
    kernel(teacher if table == "made before capture" else clones(teacher), student, decay, none)
    torch._foreach_copy_(teacher, start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(teacher, student, decay, none)
    _table.tables.clear()
    for value in (0.5, 0.75):
        decay.fill_(value)
        graph.replay()
        eager(start, student, value, none)
    for t, expected in zip(teacher, start, strict=True):
        torch.testing.assert_close(t, expected, rtol=1e-6, atol=1e-6)
