"""Ranges of the ops: names in NVTX and torch.profiler, work by formula, and what a range costs while off."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import d2vkern
from benchmarks.cases import Case
from d2vkern import _nvtx
from d2vkern._backend import STEMS
from d2vkern._costs import Cost, bucket
from d2vkern._nvtx import Tally, force_ranges, op_range, phase, requested, tally_costs

CPU = torch.device("cpu")
# Ops whose backward nobody differentiates, and ops that are there twice under one stem.
FORWARD_ONLY = {"masks", "targets", "ema", "adamw_ema"}
RANGES: dict[str, tuple[str, ...]] = {
    **{stem: (stem,) for stem in STEMS},
    "gather": ("gather", "scatter"),
    "mlp": ("mlp", "linear"),
    "adamw_ema": ("adamw_ema", "grad_norm"),
}


class Domain:
    """Stands in for an NVTX domain with a tool attached."""

    def __init__(self, name: str, log: list[tuple[object, ...]]) -> None:
        self.name, self.log = name, log

    def get_category_id(self, name: str) -> str:
        return f"id of {name}"

    def get_event_attributes(self, **attributes: object) -> dict[str, object]:
        return attributes

    def push_range(self, attributes: dict[str, object]) -> None:
        self.log.append((self.name, attributes["message"], attributes["category"], attributes["payload"]))

    def pop_range(self) -> None:
        self.log.append((self.name, "pop"))


@pytest.fixture
def nvtx_log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    log: list[tuple[object, ...]] = []
    monkeypatch.setattr("nvtx.get_domain", lambda name: Domain(name, log))
    return log


@pytest.fixture(autouse=True)
def as_torch_profiler_runs() -> Iterator[None]:
    """Whatever the environment of the test run says."""
    with force_ranges(None):
        yield


@op_range("toy/fwd/eager", lambda x: Cost("N4", bytes=x.nbytes, flops=7))
def toy(x: Tensor) -> Tensor:
    return x + 1


class Scale(torch.autograd.Function):
    @staticmethod
    @op_range("scale/fwd/eager", lambda x, by, grad: Cost("N2", x.nbytes, 3, (100 + grad[0], 5)))
    def forward(ctx, x, by):
        ctx.by = by
        return x * by

    @staticmethod
    @op_range("scale/bwd/eager")
    def backward(ctx, dout):
        return dout * ctx.by, None


def bench_cases(stem: str) -> list[Case]:
    """Every case of the benchmarks at their smallest shapes: the ops as the presets call them."""
    module = importlib.import_module(f"benchmarks.bench_{stem}")
    presets = ["audio_base"] if stem == "conv_stem" else ["image_tiny", "text_tiny"]
    return [case for preset in presets for case in module.cases(preset, "smoke", torch.bfloat16)]


def tally_case(case: Case) -> dict[str, Tally]:
    """What forward, and backward where the case has leaves, tell of their work; dropout's masks left out."""
    inputs = case.make(CPU)
    inputs |= {name: inputs[name].detach().requires_grad_() for name in case.leaves}
    with force_ranges(True), tally_costs() as tallies:
        out = case.call(inputs, "eager")
        if case.leaves:
            outputs = list(out.values()) if isinstance(out, dict) else [out]
            sum(o.float().sum() for o in outputs if o.requires_grad).backward()
    return {name: tally for name, tally in tallies.items() if not name.startswith("dropout/")}


@pytest.mark.parametrize("stem", STEMS)
def test_every_op_is_named_in_both_directions(stem: str) -> None:
    found = {name for case in bench_cases(stem) for name in tally_case(case)}
    directions = ("fwd",) if stem in FORWARD_ONLY else ("fwd", "bwd")
    assert found == {f"{op}/{direction}/eager" for op in RANGES[stem] for direction in directions}


@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem != "targets"])
def test_costs_are_those_of_the_benchmarks(stem: str) -> None:
    # Written apart. The streaming form of targets also has to read its sum again for every layer.
    for case in bench_cases(stem):
        tallies = tally_case(case)
        for direction, expected in (("fwd", case.forward), ("bwd", case.backward)):
            named = [tally for name, tally in tallies.items() if f"/{direction}/" in name]
            if direction == "fwd" or case.leaves:
                assert sum(t.bytes for t in named) == expected.bytes, (case.name, direction)
                assert sum(t.flops for t in named) == expected.flops, (case.name, direction)


def test_targets_move_each_layer_and_their_sum() -> None:
    layers = [torch.randn(2, 3, 4).bfloat16() for _ in range(3)]
    with force_ranges(True), tally_costs() as tallies:
        d2vkern.layer_targets(layers)
    # three layers of 48 bytes; the sum of 96 is written, then read and written twice, then once to divide it
    assert tallies["targets/fwd/eager"] == Tally(4, 3 * 48 + (1 + 2 + 2 + 2) * 96, 0)


def test_nvtx_sees_domain_name_bucket_and_bytes(nvtx_log: list[tuple[object, ...]]) -> None:
    with force_ranges(True), phase("student/block07"):
        toy(torch.zeros(4))
        Scale.apply(torch.zeros(2, requires_grad=True), 2.0).sum().backward()
    assert nvtx_log == [
        ("d2v", "student/block07", None, None),
        ("d2vkern", "toy/fwd/eager", "id of N4", 16),
        ("d2vkern", "pop"),
        ("d2vkern", "scale/fwd/eager", "id of N2", 8),
        ("d2vkern", "pop"),
        ("d2vkern", "scale/bwd/eager", "id of N2", 101),
        ("d2vkern", "pop"),
        ("d2v", "pop"),
    ]


def test_an_exception_closes_the_ranges(nvtx_log: list[tuple[object, ...]]) -> None:
    @op_range("broken/fwd/eager")
    def broken() -> None:
        raise RuntimeError("out of memory")

    with force_ranges(True), pytest.raises(RuntimeError, match="out of memory"), phase("teacher"):
        broken()
    assert nvtx_log[2:] == [("d2vkern", "pop"), ("d2v", "pop")]


def test_buckets_round_up_to_powers_of_two() -> None:
    assert bucket(N=12, T=196, K=1, D=768, E=0) == "N16 T256 K1 D1024 E0"


def test_torch_profiler_sees_the_same_names() -> None:
    toy(torch.zeros(4))
    with profile(activities=[ProfilerActivity.CPU]) as profiler, phase("teacher"):
        toy(torch.zeros(4))
        Scale.apply(torch.zeros(2, requires_grad=True), 2.0).sum().backward()
    names = [event.name for event in profiler.events() if event.name.startswith("d2v")]
    assert names == [
        "d2v/teacher",
        "d2vkern/toy/fwd/eager",
        "d2vkern/scale/fwd/eager",
        "d2vkern/scale/bwd/eager",
    ]


def test_without_a_tool_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvtx.get_domain", lambda name: pytest.fail("a range was opened"))
    toy(torch.zeros(4))
    with phase("teacher"), tally_costs() as tallies:
        Scale.apply(torch.zeros(2, requires_grad=True), 2.0).sum().backward()
    with force_ranges(False), profile(activities=[ProfilerActivity.CPU]):
        toy(torch.zeros(4))
    assert tallies == {}


def test_off_costs_a_few_calls() -> None:
    def plain(x: object, y: object, z: object) -> object:
        return x

    ranged = op_range("toy/fwd/eager", lambda *_: Cost(""))(plain)

    def calls(function) -> int:
        made = []
        sys.setprofile(lambda frame, event, what: made.append(event) if "call" in event else None)
        try:
            function(1, 2, 3)
        finally:
            sys.setprofile(None)
        return len(made)

    assert not _nvtx.ranges_are_on()
    assert calls(ranged) - calls(plain) <= 5


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"D2VKERN_NVTX": ""}, None),
        ({"D2VKERN_NVTX": "1"}, True),
        ({"D2VKERN_NVTX": "0", "NVTX_INJECTION64_PATH": "/opt/nsight.so"}, False),
        ({"NVTX_INJECTION64_PATH": "/opt/nsight.so"}, True),
        ({"NSYS_PROFILING_SESSION_ID": "4"}, True),
    ],
)
def test_environment(environment: dict[str, str], expected: bool | None) -> None:
    assert requested(environment) is expected


def test_environment_that_says_neither() -> None:
    with pytest.raises(ValueError, match="environment D2VKERN_NVTX: must be 0 or 1, got 'yes'"):
        requested({"D2VKERN_NVTX": "yes"})


def test_tallies_within_a_tally_that_have_heard_the_same() -> None:
    with force_ranges(True), tally_costs() as outer:
        with tally_costs() as inner:
            pass
        d2vkern.random_mask(torch.arange(2), 1, 8, prob=0.5, backend="eager")
    assert set(outer) == {"masks/fwd/eager"} and not inner


def test_traced_code_has_no_ranges_and_no_graph_break(nvtx_log: list[tuple[object, ...]]) -> None:
    def step(x: Tensor) -> Tensor:
        with phase("student/block00"):
            return Scale.apply(toy(x), 2.0).sum()

    x = torch.ones(3, requires_grad=True)
    with force_ranges(True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        compiled(x).backward()
        assert nvtx_log == []
        with phase("forward"):
            compiled(x)
    assert nvtx_log == [("d2v", "forward", None, None), ("d2v", "pop")]
    assert x.grad is not None and x.grad.tolist() == [2.0] * 3


def test_a_registered_op_keeps_its_ranges_under_compile(nvtx_log: list[tuple[object, ...]]) -> None:
    # How a backend of ours is registered: the ranges sit inside the implementation.
    library = torch.library.Library("d2vkern_nvtx_test", "DEF")
    for name, factor in (("double_fwd", 2.0), ("double_bwd", 2.0)):
        direction = name.removeprefix("double_")
        library.define(f"{name}(Tensor x) -> Tensor")
        body = op_range(f"double/{direction}/triton")(lambda x, factor=factor: x * factor)
        library.impl(name, body, "CPU")
        torch.library.register_fake(f"d2vkern_nvtx_test::{name}", lambda x: x.new_empty(x.shape), lib=library)
    ops = torch.ops.d2vkern_nvtx_test

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return ops.double_fwd(x)

        @staticmethod
        def backward(ctx, dout):
            return ops.double_bwd(dout)

    compiled = torch.compile(lambda x: Double.apply(x).sum(), fullgraph=True, backend="aot_eager")
    x = torch.ones(3, requires_grad=True)
    with force_ranges(True):
        compiled(x).backward()
    assert [entry[1] for entry in nvtx_log] == ["double/fwd/triton", "pop", "double/bwd/triton", "pop"]
    assert x.grad is not None and x.grad.tolist() == [2.0] * 3
