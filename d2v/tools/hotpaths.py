"""Where the time and memory of a step go: a torch.profiler trace, folded into the named ranges.

Time is what operators take on a CPU and what kernels and copies take on a GPU; Python and launch gaps are in
neither. A piece of it belongs to the outermost op range around it ("attention/bwd/triton"), else to the first
word of the innermost phase, split into matrix products and the rest ("student linear", "backward other").
A kernel belongs where the operator that launched it belongs; an operator of d2vkern, whose range opens inside
it, belongs to that. Autograd's own threads open no phases: what has no range there belongs to the phase that
is open on the thread of the step.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.autograd import DeviceType

OPS, PHASES, STEP = "d2vkern/", "d2v/", "d2v/step"
OPERATORS = ("d2vkern::", "d2vkern_native::")
"""what a Triton or CUDA kernel of ours is launched by: no operator of PyTorch stands between"""
LINEAR = frozenset(
    f"aten::{name}" for name in ("linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "_addmm_activation")
)


@dataclass(frozen=True)
class Event:
    """One entry of a trace; times in ns."""

    kind: Literal["range", "op", "kernel", "memory"]
    name: str
    start: int
    end: int
    thread: int = 0
    id: int = 0
    """of a range or op: what a kernel's `link` points to"""
    link: int = 0
    bytes: int = 0
    """of a memory event: allocated, negative where freed"""


@dataclass
class HotPath:
    """One row of the table."""

    steps: Counter[int] = field(default_factory=Counter)
    """ns in each traced step"""
    calls: int = 0
    """of all steps: ranges of an op, matrix products of a phase"""
    kernels: int = 0
    """of all steps"""
    peak: int = 0
    """bytes above the start of the step at their highest while this ran"""


@dataclass
class Trace:
    """All rows of the traced steps."""

    steps: int = 0
    rows: defaultdict[str, HotPath] = field(default_factory=lambda: defaultdict(HotPath))
    unnamed: Counter[str] = field(default_factory=Counter)
    """operator or kernel -> ns outside of every named range, in all steps"""
    peak: int = 0
    """bytes above the start of the step, at the highest"""

    @property
    def nanoseconds(self) -> int:
        """Of all operators or kernels of all steps."""
        return sum(row.steps.total() for row in self.rows.values()) + self.unnamed.total()

    def seconds(self, row: str) -> float:
        """Median over the steps: on a shared machine single ones are interrupted."""
        path = self.rows[row]
        return statistics.median([path.steps[step] for step in range(self.steps)]) / 1e9

    @property
    def coverage(self) -> float:
        """Share of the time that lies inside named ranges."""
        total = self.nanoseconds
        return 1 - self.unnamed.total() / total if total else 0.0

    def add(self, other: Trace) -> None:
        """Append the steps of another trace."""
        for name, path in other.rows.items():
            row = self.rows[name]
            row.steps.update({self.steps + step: spent for step, spent in path.steps.items()})
            row.calls += path.calls
            row.kernels += path.kernels
            row.peak = max(row.peak, path.peak)
        self.steps += other.steps
        self.unnamed.update(other.unnamed)
        self.peak = max(self.peak, other.peak)


def read_events(profiler: torch.profiler.profile) -> list[Event]:
    """The events of a finished torch.profiler session."""
    session = profiler.profiler
    assert session is not None and session.kineto_results is not None
    events = []
    for e in session.kineto_results.events():
        name, on_cpu = e.name(), e.device_type() == DeviceType.CPU
        where = {"start": e.start_ns(), "end": e.end_ns(), "thread": e.start_thread_id()}
        if name == "[memory]":
            events.append(Event("memory", name, **where, bytes=e.nbytes()))  # type: ignore[attr-defined]
        elif not on_cpu:
            if not e.is_user_annotation():
                events.append(Event("kernel", name, **where, link=e.linked_correlation_id()))
        elif e.linked_correlation_id() == 0:  # else a call of the CUDA runtime, not an operator
            named = name.startswith((OPS, PHASES))
            events.append(Event("range" if named else "op", name, **where, id=e.correlation_id()))
    return events


@dataclass
class _Frame:
    """An open range or operator."""

    event: Event
    in_step: bool
    op: str | None
    """outermost op range"""
    phase: str | None
    linear: bool
    first: bool = False
    """whether it is a matrix product and not a part of one"""
    children: int = 0

    @property
    def row(self) -> str | None:
        if self.op is not None:
            return self.op
        if self.phase is None:
            return None
        return f"{self.phase} {'linear' if self.linear else 'other'}"


def _open(event: Event, parent: _Frame | None) -> _Frame:
    in_step, op, phase, linear = (
        (False, None, None, False)
        if parent is None
        else (parent.in_step, parent.op, parent.phase, parent.linear)
    )
    if event.name == STEP:
        in_step = True
    elif event.kind == "range" and event.name.startswith(OPS):
        op = op or event.name.removeprefix(OPS)
    elif event.kind == "range":
        phase, linear = event.name.removeprefix(PHASES).split("/")[0], False
    elif event.kind == "op":
        linear = linear or event.name in LINEAR
    return _Frame(event, in_step, op, phase, linear, linear and not (parent is not None and parent.linear))


def _nest(events: Iterable[Event]) -> Iterator[tuple[_Frame, int]]:
    """Every range, operator and memory event of one thread, with its ns outside of its children."""
    stack: list[_Frame] = []

    def close(until: int) -> Iterator[tuple[_Frame, int]]:
        while stack and stack[-1].event.end <= until:
            done = stack.pop()
            yield done, done.event.end - done.event.start - done.children

    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        yield from close(event.start)
        parent = stack[-1] if stack else None
        frame = _open(event, parent)
        if event.kind == "memory":
            yield frame, 0
            continue
        if parent is not None:
            parent.children += event.end - event.start
            if parent.event.kind == "op" and parent.event.name.startswith(OPERATORS):
                parent.op = parent.op or frame.op
        stack.append(frame)
    yield from close(max((frame.event.end for frame in stack), default=0))


def fold(events: list[Event]) -> Trace:
    """Fold a trace into rows; what lies outside of the ranges `d2v/step` is left out."""
    threads: defaultdict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind != "kernel":
            threads[event.thread].append(event)
    frames = [pair for some in threads.values() for pair in _nest(some)]
    main = [frame for frame, _ in frames if frame.event.kind == "range" and frame.in_step]
    for frame, _ in frames:
        if not frame.in_step:
            _adopt(frame, main)
    starts = sorted(frame.event.start for frame in main if frame.event.name == STEP)
    trace = Trace(steps=len(starts))
    kernels = [event for event in events if event.kind == "kernel"]
    for frame, own in frames:
        if frame.in_step and frame.event.kind != "memory":
            _count(trace, frame)
            if frame.event.kind == "op" and not kernels:
                _spend(trace, frame, frame.event.name, own, bisect_right(starts, frame.event.start) - 1)
    owners = {frame.event.id: frame for frame, _ in frames if frame.event.kind != "memory"}
    for kernel in kernels:
        owner = owners.get(kernel.link)
        if owner is not None and owner.in_step:
            step = bisect_right(starts, owner.event.start) - 1
            _spend(trace, owner, kernel.name, kernel.end - kernel.start, step)
            if owner.row is not None:
                trace.rows[owner.row].kernels += 1
    _memory([frame for frame, _ in frames if frame.event.kind == "memory" and frame.in_step], trace)
    return trace


def _count(trace: Trace, frame: _Frame) -> None:
    if frame.event.kind == "range":
        if frame.row == frame.event.name.removeprefix(OPS):
            trace.rows[frame.row].calls += 1
    elif frame.first and frame.op is None and frame.row is not None:
        trace.rows[frame.row].calls += 1


def _spend(trace: Trace, frame: _Frame, name: str, nanoseconds: int, step: int) -> None:
    if frame.row is None:
        trace.unnamed[name] += nanoseconds
    else:
        trace.rows[frame.row].steps[step] += nanoseconds


def _covers(outer: _Frame, event: Event) -> bool:
    return outer.event.start <= event.start < outer.event.end


def _adopt(frame: _Frame, main: list[_Frame]) -> None:
    """Give a frame of another thread the phase that is open on the step's thread."""
    around = [outer for outer in main if _covers(outer, frame.event)]
    if around:
        innermost = max(around, key=lambda outer: outer.event.start)
        frame.in_step = True
        frame.phase = frame.phase or innermost.phase


def _memory(frames: list[_Frame], trace: Trace) -> None:
    """Peaks of the running total of allocations, over all and by row."""
    level = 0
    for frame in sorted(frames, key=lambda f: f.event.start):
        level += frame.event.bytes
        trace.peak = max(trace.peak, level)
        if frame.row is not None:
            path = trace.rows[frame.row]
            path.peak = max(path.peak, level)
