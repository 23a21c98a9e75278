"""The Triton AdamW with teacher and copies: against eager and fp64, torch.optim.AdamW, and its own bits."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2vkern import AdamWEMA
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.reference.adamw_ema import adamw_ema_ as eager
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from d2vkern.kernels import _table
from d2vkern.kernels._launch import record_launches
from d2vkern.kernels.adamw_ema import adamw_ema_ as kernel

CHUNK = 8192
FP16, FP32 = torch.float16, torch.float32
SIZES = {
    "scalar": (),
    "one element": (1,),
    "nothing": (0, 3),
    "less than a vector": (3,),
    "prime": (61, 17),
    "bias": (768,),
    "one chunk": (CHUNK,),
    "two chunks, the last short": (CHUNK + 5,),
}
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def no_tables() -> None:
    _table.tables.clear()


class State:
    """What one call works on: lists of tensors for `shapes`; teachers and copies in some rows only."""

    def __init__(self, device: torch.device, shapes: list[tuple[int, ...]], low: torch.dtype = FP16) -> None:
        def draw() -> list[Tensor]:
            return [torch.randn(shape, device=device) for shape in shapes]

        def some(tensors: list[Tensor], every: int, dtype: torch.dtype) -> list[Tensor | None]:
            return [t.to(dtype) if i % every else None for i, t in enumerate(tensors, 1)]

        self.params, self.grads, self.exp_avgs = draw(), draw(), draw()
        self.exp_avg_sqs = [x.square() + m.square() for x, m in zip(draw(), self.exp_avgs, strict=True)]
        self.teachers, self.copies = some(draw(), 4, FP32), some(draw(), 3, low)
        self.teacher_copies = [
            None if t is None or i % 2 else t.to(low) for i, t in enumerate(self.teachers, 1)
        ]

    def written(self) -> dict[str, Tensor]:
        """Every tensor that a call may change, by name."""
        lists = {name: tensors for name, tensors in vars(self).items() if name != "grads"}
        return {f"{name}[{i}]": t for name in lists for i, t in enumerate(lists[name]) if t is not None}

    def clone(self, dtype: torch.dtype = FP32, device: torch.device | None = None) -> State:
        """The same values, fp32 in `dtype`, contiguous: torch's fused AdamW for CPUs ignores strides."""
        twin = copy.deepcopy(self)
        for tensors in vars(twin).values():
            for i, x in enumerate(tensors):
                if x is not None:
                    tensors[i] = x.contiguous().to(device, dtype if x.dtype == FP32 else x.dtype)
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
    return [torch.tensor(step, device=p.device) for p in state.params]


def assert_parity(state: State, steps: float | list[Tensor], **settings: Any) -> None:
    """The kernel and eager from the same state: at most twice eager's error to fp64, gradients as they were,
    copies exactly the new values."""
    by_eager, exact, grads = state.clone(), state.clone(torch.float64), state.clone().grads
    by_eager.run(eager, steps, **settings)
    exact.run(eager, steps, **settings)
    state.run(kernel, steps, **settings)
    for name, ours in state.written().items():
        if "copies" not in name:
            assert_no_worse_than_eager(ours, by_eager.written()[name], exact.written()[name])
    for g, before in zip(state.grads, grads, strict=True):
        assert_bitwise_equal(g, before)
    pairs = list(zip(state.params, state.copies, strict=True))
    if settings.get("ema_decay", 0.9) is not None:
        pairs += zip(state.teachers, state.teacher_copies, strict=True)
    for source, low in pairs:
        if low is not None:
            assert_bitwise_equal(low, source.to(low.dtype))


def assert_same_bits(ours: State, theirs: State) -> None:
    for x, y in zip(ours.written().values(), theirs.written().values(), strict=True):
        assert_bitwise_equal(x, y)


def make_params(device: torch.device, shapes: tuple[tuple[int, ...], ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def clones(tensors: list[Any]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p) for p in clones(params)]


def on_both(params: list[nn.Parameter], **settings: Any) -> list[tuple[list[Any], list[Tensor], AdamWEMA]]:
    """(parameters, teachers, optimizer) on triton and on eager, from the same start."""
    found = []
    for backend in ("triton", "eager"):
        mine, teachers = twins(params), clones(params)
        found.append((mine, teachers, AdamWEMA(mine, teacher=teachers, backend=backend, **settings)))
    return found


@pytest.mark.parametrize("name", SIZES)
def test_sizes(triton_device: torch.device, name: str) -> None:
    assert_parity(State(triton_device, [SIZES[name]]), 3.0, clip_factor=0.7)


@pytest.mark.parametrize("eps_mode", ["torch", "fairseq"])
@pytest.mark.parametrize("step", [1.0, 2.0, 40.0, 1e6])
def test_steps_on_the_host_and_on_the_device(triton_device: torch.device, step: float, eps_mode: str) -> None:
    start = State(triton_device, [SIZES["prime"], SIZES["bias"]])
    for steps in (step, on_device(start, step)):
        assert_parity(start.clone(), steps, eps_mode=eps_mode, eps=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {"betas": (0.0, 0.0)},
        {"betas": (0.9, 0.999)},
        {"betas": (0.5, 0.99999)},
        {"weight_decay": 0.0, "eps": 1e-30},
        {"lr": 0.0, "ema_decay": None},
        {"ema_decay": 0.99999},
    ],
    ids=str,
)
def test_settings(triton_device: torch.device, settings: dict[str, Any]) -> None:
    start = State(triton_device, [SIZES["prime"]])
    for steps in (1.0, 7.0, on_device(start, 7.0)):
        assert_parity(start.clone(), steps, **settings)


def test_parameters_at_zero_show_the_step_itself(triton_device: torch.device) -> None:
    state = State(triton_device, [SIZES["prime"]])
    state.params[0].zero_()
    for steps in (2.0, on_device(state, 2.0)):
        assert_parity(state.clone(), steps, clip_factor=0.37, betas=(0.9, 0.999), eps=1e-8)


def test_numbers_on_the_device(triton_device: torch.device) -> None:
    def scalar(value: float, dtype: torch.dtype = FP32) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=triton_device)

    start = State(triton_device, [SIZES["prime"]])
    decay = scalar(0.9998, torch.float64)
    for lr, steps in ((scalar(0.25), on_device(start, 3.0)), (scalar(1e-3, torch.float64), 3.0)):
        assert_parity(start.clone(), steps, lr=lr, clip_factor=scalar(0.3), ema_decay=decay)


def test_a_hundred_tensors_of_odd_sizes_in_one_launch(triton_device: torch.device) -> None:
    state = State(triton_device, [((7 * i) % 83,) for i in range(99)] + [(CHUNK + 1,)])
    with record_launches() as launches:
        assert_parity(state, 2.0, clip_factor=torch.tensor(0.5, device=triton_device))
    programs = sum(p.numel() > 0 for p in state.params) + 1
    assert [launch.grid for launch in launches] == [(programs,)]
    assert len(launches[0].constexprs["KINDS"]) > 4


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_misaligned_views_and_their_neighbours(triton_device: torch.device, offset: int) -> None:
    size = 61
    for moved in vars(State(triton_device, [])):
        state = State(triton_device, [(size,)] * 2)
        tensors = getattr(state, moved)
        memory = torch.full((size + 9,), 7.0, dtype=tensors[1].dtype, device=triton_device)
        memory[offset : offset + size] = tensors[1]
        tensors[1] = memory[offset : offset + size]
        assert_parity(state, 2.0)
        assert (memory[:offset] == 7).all() and (memory[offset + size :] == 7).all(), moved


@pytest.mark.parametrize("layout", ["shared", "gradient differs", "moments differ", "gaps"])
def test_layouts(triton_device: torch.device, layout: str) -> None:
    state = State(triton_device, [(3, 5), (3, 5)])
    for name, tensors in vars(state).items():
        strays = {"gradient differs": name == "grads", "moments differ": name.startswith("exp")}
        if layout == "gaps":
            if name in ("params", "exp_avgs", "copies"):
                tensors[1] = tensors[1].repeat_interleave(2, dim=1)[:, ::2]
        elif layout == "shared" or strays[layout]:
            tensors[1] = tensors[1].t().contiguous().t()
    assert_parity(state, 2.0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_an_overflowing_square_stops_the_element_and_no_more(triton_device: torch.device) -> None:
    state = State(triton_device, [(5,)])
    state.grads[0][2] = 1e25
    twin = state.clone(device=torch.device("cpu"))  # PyTorch's CUDA kernel makes NaN of infinity
    for step in (1.0, 2.0):
        state.run(kernel, step, weight_decay=0.0)
        twin.run(eager, step, weight_decay=0.0)
        assert state.exp_avg_sqs[0][2] == twin.exp_avg_sqs[0][2] == float("inf")
        torch.testing.assert_close(state.params, twin.params, check_device=False)
        state.grads[0][2] = twin.grads[0][2] = 1.0


@pytest.mark.parametrize("step", [0.0, 3.0], ids=["skipped first step", "later"])
def test_found_inf_changes_nothing(triton_device: torch.device, step: float) -> None:
    state = State(triton_device, [SIZES["prime"], SIZES["bias"], ()])
    state.grads[0][3] = float("nan")
    before = state.clone()
    for found in (1.0, float("nan")):
        found_inf = torch.tensor(found, device=triton_device)
        state.run(kernel, on_device(state, step), found_inf=found_inf)
        assert_same_bits(state, before)
    twin = state.clone()
    state.run(kernel, on_device(state, 4.0), found_inf=torch.zeros((), device=triton_device))
    twin.run(kernel, on_device(state, 4.0))
    assert_same_bits(state, twin)


def test_optimizer_skips_where_inf_was_found(triton_device: torch.device) -> None:
    both = on_both(make_params(triton_device, ((7, 3), (5,))), capturable=True)
    for step, found in enumerate((1.0, 0.0, 1.0, 0.0)):
        for params, _, optimizer in both:
            set_grads(params, step)
            optimizer.step(ema_decay=0.5, found_inf=torch.tensor(found, device=triton_device))
    (ours, teachers, optimizer), (theirs, expected, _) = both
    assert optimizer.state[ours[0]]["step"] == 2
    torch.testing.assert_close([*ours, *teachers], [*theirs, *expected], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_trajectory_beside_torch_adamw(triton_device: torch.device, capturable: bool) -> None:
    ours = make_params(triton_device, ((9, 5), (11,), (1, 1, 3)))
    theirs, exact = twins(ours), [nn.Parameter(p.detach().double()) for p in ours]
    settings = SETTINGS | {"betas": (0.9, 0.999)}
    teacher, averages = clones(ours), [clones(theirs), clones(exact)]
    optimizer = AdamWEMA(ours, **settings, teacher=teacher, capturable=capturable, backend="triton")
    oracles = [torch.optim.AdamW(params, **settings) for params in (theirs, exact)]
    for step in range(20):
        set_grads(ours, step)
        optimizer.step(ema_decay=0.99)
        for params, oracle, average in zip((theirs, exact), oracles, averages, strict=True):
            for p, q in zip(params, ours, strict=True):
                p.grad = q.grad.to(p.dtype)
            oracle.step()
            for t, p in zip(average, params, strict=True):
                t.lerp_(p.detach(), 1 - 0.99)
    for i in range(len(ours)):
        assert_no_worse_than_eager(ours[i].detach(), theirs[i].detach(), exact[i].detach())
        assert_no_worse_than_eager(teacher[i], averages[0][i], averages[1][i])
        states = optimizer.state[ours[i]], oracles[0].state[theirs[i]], oracles[1].state[exact[i]]
        for name in ("exp_avg", "exp_avg_sq"):
            assert_no_worse_than_eager(*(state[name] for state in states))


def test_state_dict_goes_to_torch_and_back(triton_device: torch.device) -> None:
    ours = make_params(triton_device, ((4, 3), (5,)))
    optimizer = AdamWEMA(ours, **SETTINGS, backend="triton")
    set_grads(ours, 0)
    optimizer.step()
    theirs = twins(ours)
    oracle = torch.optim.AdamW(theirs)
    oracle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    back = AdamWEMA(ours, backend="triton")
    back.load_state_dict(copy.deepcopy(oracle.state_dict()))
    for step in (1, 2):
        set_grads(ours, step)
        set_grads(theirs, step)
        back.step()
        oracle.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert back.state[ours[0]]["step"] == 3


def test_groups_and_a_missing_gradient(triton_device: torch.device) -> None:
    both = on_both(make_params(triton_device, ((4, 3), (5,), (2,))), weight_decay=0.5)
    for params, _, optimizer in both:
        optimizer.param_groups[0]["params"] = params[:1]
        optimizer.param_groups[0]["eps_mode"] = "fairseq"
        optimizer.add_param_group({"params": params[1:], "lr": 0.2, "betas": (0.5, 0.9)})
    with backend_spy() as calls, record_launches() as launches:
        for step in range(3):
            for params, _, optimizer in both:
                set_grads(params, step)
                params[2].grad = None
                optimizer.step(ema_decay=0.75)
    assert calls[:3] == [("adamw_ema", "triton"), ("adamw_ema", "triton"), ("ema", "triton")]
    assert len(launches) == 3 * 3
    (ours, teachers, _), (theirs, expected, _) = both
    torch.testing.assert_close([*ours, *teachers], [*theirs, *expected], rtol=1e-6, atol=1e-6)


def test_the_table_follows_the_gradients(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds, original = [], _table._build
    monkeypatch.setattr(_table, "_build", lambda *args: builds.append(1) or original(*args))
    params = make_params(triton_device, ((6, 4), (5,)))
    optimizer = AdamWEMA(params, 0.01, backend="triton")
    set_grads(params, 0)
    for _ in range(3):
        optimizer.step()
    assert len(builds) == 1
    kept, params[0].grad = params[0].grad, params[0].grad.clone()
    optimizer.step()
    assert len(builds) == 2
    params[0].grad = kept
    optimizer.step()
    assert len(builds) == 2
    params[1].data = params[1].data.clone()
    optimizer.step()
    assert len(builds) == 3


@pytest.mark.usefixtures("poisoned_empty")
def test_repeats_bitwise_with_poisoned_memory(triton_device: torch.device) -> None:
    start = State(triton_device, [SIZES["prime"], (5, 3), (7,)])
    start.exp_avgs[1] = start.exp_avgs[1].t().contiguous().t()
    results = []
    for _ in range(2):
        _table.tables.clear()
        results.append(start.clone())
        for step in (1.0, 2.0):
            results[-1].run(kernel, step, clip_factor=0.7)
    assert_same_bits(*results)
    assert all(x.isfinite().all() for x in results[0].written().values())


def test_written_tensors_count_as_changed(triton_device: torch.device) -> None:
    state = State(triton_device, [(4,), (3,)])
    state.run(kernel, 1.0)
    assert {t._version for t in state.written().values()} == {1}
    assert {g._version for g in state.grads} == {0}


def test_refusals(triton_device: torch.device) -> None:
    state = State(triton_device, [(4,), (4,)])
    state.teachers[0] = state.teachers[0].double()
    with pytest.raises(ValueError, match=r"adamw_ema: teachers\[0\] must be fp32.*, got torch.float64"):
        state.run(kernel, 1.0)
    state = State(triton_device, [(4,), (4,)])
    state.params[1] = state.params[0]
    with pytest.raises(ValueError, match="adamw_ema: params must not hold the same memory twice"):
        state.run(kernel, 1.0)
    if triton_device.type == "cpu":
        with pytest.raises(ValueError, match=r"copies\[0\] must be fp32 or fp16 in Triton's interpreter"):
            State(triton_device, [(4,)], torch.bfloat16).run(kernel, 1.0)
    with pytest.raises(ValueError, match="adamw_ema: backend 'triton'.* fp64 tensors run on eager only"):
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64, device=triton_device))
        p.grad = torch.zeros_like(p)
        AdamWEMA([p], backend="triton").step()


def test_range_names_bytes(triton_device: torch.device) -> None:
    state = State(triton_device, [(8,)])
    for ema_decay, expected in ((0.9, 8 * (28 + 2 + 8 + 0)), (None, 8 * (28 + 2))):
        with force_ranges(True), tally_costs() as tallies:
            state.run(kernel, 1.0, ema_decay=ema_decay)
        assert {name: t.bytes for name, t in tallies.items()} == {"adamw_ema/fwd/triton": expected}


def test_opcheck(triton_device: torch.device) -> None:
    state = State(triton_device, [(5,), (3, 2)])
    scalar = torch.tensor(1.0, device=triton_device)
    numbers = (1.0, 0.9, 2.0, 0.1, 0.9, 0.98, 1e-6, 0.01)
    for tensors in ((None,) * 5, (scalar * 0, scalar, scalar, scalar, scalar)):
        args = (state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, state.teachers, [0, 1])
        args += (state.copies[:1], [0], [state.teacher_copies[1]], [1], *tensors, *numbers, "fairseq")
        torch.library.opcheck(torch.ops.d2vkern.adamw_ema_.default, args)


def test_compiled_step(triton_device: torch.device) -> None:
    weights = []
    torch._dynamo.reset()
    for wrap in (lambda step: step, lambda step: torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        params = make_params(triton_device, ((5, 3), (4,)))
        teacher, low = clones(params), [torch.zeros_like(p, dtype=FP16) for p in params]
        optimizer = AdamWEMA(
            params, 0.1, teacher=teacher, copies=low, capturable=True, eps_mode="fairseq", backend="triton"
        )
        step = wrap(optimizer.step)
        set_grads(params, 0)
        for _ in range(2):
            step(ema_decay=0.9, clip_factor=torch.tensor(0.5, device=triton_device))
        weights.append([*params, *teacher, *low])
    for compiled, plain in zip(*weights, strict=True):
        assert_bitwise_equal(compiled.detach(), plain.detach())
    torch._dynamo.reset()


@pytest.mark.gpu
def test_bf16_copies(triton_device: torch.device) -> None:
    assert_parity(State(triton_device, list(SIZES.values()), torch.bfloat16), 3.0)


@pytest.mark.gpu
@pytest.mark.parametrize("table", ["made before capture", "made during capture"])
def test_cuda_graph(triton_device: torch.device, table: str) -> None:
    state = State(triton_device, [SIZES["prime"], SIZES["bias"]])
    twin, steps = state.clone(), on_device(state, 1.0)
    clip, found_inf = torch.ones(2, device=triton_device).unbind()
    settings: dict[str, Any] = {"clip_factor": clip, "found_inf": found_inf}
    # Compiles the kernel in any case; inf is found, so that nothing changes.
    (state if table == "made before capture" else state.clone()).run(kernel, steps, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.run(kernel, steps, **settings)
    _table.tables.clear()
    for step, found in ((1.0, 0.0), (2.0, 1.0), (2.0, 0.0)):
        torch._foreach_copy_(steps, on_device(state, step))
        found_inf.fill_(found)
        graph.replay()
        twin.run(eager, on_device(twin, step), **settings)
    for ours, theirs in zip(state.written().values(), twin.written().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
