"""Gate, then time: from the cases of a bench_<op>.py to rows of results.

For each case the variants line up: eager, torch.compile of it, every further backend in the registry (those
made by others count as peers, not as ours), plain PyTorch, the case's peers. None gets a number unless its
parity check at that very shape has just passed (benchmarks/gate.py). Then they take turns, round after round,
each on inputs that rotate past the last-level cache. On a GPU a turn replays a CUDA graph over all input sets
between two events; on a CPU it is a loop under perf_counter. Reported are the median over rounds and the
interquartile range.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import (
    Call,
    Case,
    Inputs,
    Settings,
    Unavailable,
    backward,
    gradients_like,
    make_inputs,
    named,
    tensors,
)
from benchmarks.gate import Gate
from benchmarks.machine import last_level_cache
from d2v.tools.ceilings import synchronize
from d2vkern._backend import PEERS, REGISTRY, BackendError, gaps
from d2vkern.testing import peak_memory


@dataclass(frozen=True)
class Variant:
    """One way to run a case. ours: d2vkern's own code. run None: unavailable, for the reason given."""

    name: str
    ours: bool
    run: Call | None
    reason: str = ""
    optional: bool = False
    """an exception is a reason to leave it out, not a failure: other people's code"""


def variants_of(stem: str, case: Case, settings: Settings, given: list[Tensor]) -> list[Variant]:
    """Everything that can run a case. Eager comes first: it is what the others are held against."""

    def on(name: str) -> Call:
        return lambda inputs: case.call(inputs, name)

    found = [Variant("eager", True, on("eager"))]
    if settings.compile:
        compiled = torch.compile(on("eager"), fullgraph=True, dynamic=False)
        found.append(Variant("compile", False, compiled, optional=True))
    else:
        found.append(Variant("compile", False, None, "switched off"))
    for name in REGISTRY[stem]:
        if name != "eager":
            reasons = gaps(stem, name, *given)
            others = name in PEERS.get(stem, ())
            run = None if reasons else on(name)
            found.append(Variant(name, not others, run, "; ".join(reasons), optional=others))
    found.append(Variant("pytorch", False, case.plain))
    found += [Variant(name, False, run, optional=True) for name, run in case.peers.items()]
    return found


def measure_case(
    stem: str, case: Case, settings: Settings, variants: list[Variant] | None = None
) -> list[dict[str, Any]]:
    """Rows (one per variant and direction) with a time, a reason why there is none, or the gate's failure."""
    torch.compiler.reset()
    inputs = make_inputs(case, settings, 0)
    if variants is None:
        variants = variants_of(stem, case, settings, list(tensors(inputs))[:1])
    directions = ["forward", "forward+backward"] if case.leaves else ["forward"]
    gate = Gate(case, settings)
    refused: dict[str, tuple[str, str]] = {}
    for variant in variants:
        status, reason = admit(variant, gate)
        if status != "ok":
            refused[variant.name] = (status, reason)
    count = sets_needed(inputs, settings)
    del gate, inputs
    sets = [with_gradients(case, make_inputs(case, settings, i), settings) for i in range(count)]
    rows = []
    for direction in directions:
        runs = {
            variant.name: [step_of(case, variant.run, some, direction) for some in sets]
            for variant in variants
            if variant.run is not None and variant.name not in refused
        }
        timed = time_variants(runs, settings)
        for variant in variants:
            row = _row(stem, case, variant, direction)
            if variant.name in refused:
                row["status"], row["reason"] = refused[variant.name]
            else:
                row |= {"status": "ok", "sets": len(sets), **timed[variant.name]}
                row["peak_MiB"] = peak_of(runs[variant.name][0], settings.device) / (1 << 20)
            rows.append(row)
    return rows


def admit(variant: Variant, gate: Gate) -> tuple[str, str]:
    """("ok" | "skipped" | "failed", reason)."""
    if variant.run is None:
        return "skipped", variant.reason
    try:
        gate.check(variant.run)
    except AssertionError as error:
        return "failed", f"gate: {error}"
    except (Unavailable, BackendError) as error:
        return "skipped", str(error)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return ("skipped" if variant.optional else "failed"), text
    return "ok", ""


def _row(stem: str, case: Case, variant: Variant, direction: str) -> dict[str, Any]:
    both = direction == "forward+backward"
    return {
        "stem": stem,
        "op": case.op,
        "case": case.name,
        "preset": case.preset,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "direction": direction,
        "variant": variant.name,
        "ours": variant.ours,
        "bytes": case.forward.bytes + (case.backward.bytes if both else 0),
        "flops": case.forward.flops + (case.backward.flops if both else 0),
    }


def with_gradients(case: Case, inputs: Inputs, settings: Settings) -> tuple[Inputs, dict[str, Tensor]]:
    """An input set and the gradients its backward starts from."""
    if not case.leaves:
        return inputs, {}
    outputs = named(case.call(inputs, "eager"))
    return inputs, gradients_like(outputs, settings, case.dtype)


def step_of(
    case: Case, run: Call, some: tuple[Inputs, dict[str, Tensor]], direction: str
) -> Callable[[], object]:
    inputs, gradients = some
    if direction == "forward":
        return lambda: run(inputs)
    return lambda: backward(case, inputs, named(run(inputs)), gradients)


def time_variants(
    runs: dict[str, list[Callable[[], object]]], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Interleaved medians: in every round each variant has one turn, over all its input sets."""
    turns = {name: _turn(calls, settings) for name, calls in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    for i in range(settings.rounds):
        first = i % max(1, len(order))
        for name in order[first:] + order[:first]:
            turn = turns[name]
            if i < turn.rounds:
                times[name].append(turn.seconds_per_call())
    found = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        found[name] = {
            "us": statistics.median(values) * 1e6,
            "iqr_us": (high - low) * 1e6,
            "rounds": len(values),
            "calls_per_round": turns[name].calls,
            "timing": turns[name].clock,
        }
    return found


@dataclass
class _Turn:
    """A variant's turn: `calls` calls under one clock reading."""

    run: Callable[[], float]  # seconds of the whole turn
    calls: int
    rounds: int
    clock: str

    def seconds_per_call(self) -> float:
        return self.run() / self.calls


def _turn(calls: list[Callable[[], object]], settings: Settings) -> _Turn:
    """Warm up, see how long a pass over the input sets takes, and size the turn by that."""
    device = settings.device
    one_pass, clock = (lambda: [call() for call in calls]), "perf_counter"
    one_pass()
    if device.type == "cuda":
        one_pass, clock = _graph(calls, device)
    one_pass()
    synchronize(device)
    start = time.perf_counter()
    one_pass()
    synchronize(device)
    seconds = max(time.perf_counter() - start, 1e-7)
    passes = max(1, math.ceil(settings.turn_seconds / seconds))
    rounds = max(3, min(settings.rounds, int(settings.budget_seconds / (passes * seconds))))

    def host() -> float:
        start = time.perf_counter()
        for _ in range(passes):
            one_pass()
        return time.perf_counter() - start

    def events() -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(passes):
            one_pass()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3

    run = events if device.type == "cuda" else host
    return _Turn(run, passes * len(calls), min(rounds, settings.rounds), clock)


def _graph(calls: list[Callable[[], object]], device: torch.device) -> tuple[Callable[[], Any], str]:
    """All calls as one CUDA graph; where capture fails, the calls themselves and why."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except Exception as error:
        torch.cuda.synchronize(device)
        return (lambda: [call() for call in calls]), f"events, no graph: {str(error).strip().splitlines()[0]}"
    return graph.replay, "CUDA graph, events"


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes by which tensor memory rises during a call."""
    if device.type != "cuda":
        return peak_memory(call)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def sets_needed(inputs: Inputs, settings: Settings) -> int:
    """Input sets that together exceed three times the last-level cache."""
    size = sum(t.numel() * t.element_size() for t in tensors(inputs))
    return max(1, min(settings.most_sets, math.ceil(3 * last_level_cache(settings.device) / max(1, size))))
