"""Nsight Systems: what its reports say about the hot paths.

benchmarks/nsys.sh runs `d2v train ... --profile nsys --profile-steps 10:20` under
nsys and hands the files of `nsys stats --format csv` to `python -m d2v.tools.nsys FILE...`, which prints a
table of time, launches and idle gaps per hot path and exits with 1 when less than 98% of the kernel time lies
inside named ranges.

Two traces are joined here instead of reading the summary `nvtx_kern_sum`, which counts a kernel once for
every range around it and sees only ranges of the thread that launched it: autograd launches the backward pass
from a thread of its own, while `backward` is open on the main one. So each kernel belongs to one row, by the
rules of `d2v profile`: the outermost op range around its launch, else the innermost phase of its thread, else
the phase opened last on another thread of its process. The range around a whole step names nothing.

Columns are found by name, as the report scripts that came with Nsight Systems in 2024 print them; 2026.3
prints the range trace alike.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

OPS, PHASES, STEP = "d2vkern", "d2v", "step"
WANTED = 0.98
"""share of the kernel time that must lie inside named ranges"""
REPORTS = {
    "nvtx_pushpop_trace": ("Start (ns)", "End (ns)", "Name", "PID", "TID"),
    "cuda_kern_exec_trace": (
        "API Start (ns)", "Kernel Start (ns)", "Kernel Dur (ns)", "PID", "TID", "DevId", "Kernel Name",
    ),
    "cuda_gpu_kern_sum": ("Time (%)", "Total Time (ns)", "Instances", "Name"),
}  # fmt: skip
"""report -> the columns that tell it from the others"""


class Thread(NamedTuple):
    """Who opened a range or launched a kernel."""

    pid: int
    tid: int


@dataclass(frozen=True)
class Range:
    """One instance of a named range; times in ns on the host's clock."""

    path: str
    start: int
    end: int
    thread: Thread

    @property
    def is_op(self) -> bool:
        """An op's range, not a phase's."""
        return "/" in self.path


@dataclass(frozen=True)
class Launch:
    """One kernel: where and when it was launched, when and how long it ran, in ns."""

    called: int
    thread: Thread
    device: int
    start: int
    duration: int
    kernel: str


@dataclass
class Row:
    """What one hot path took, over all captured steps; times in ns."""

    calls: int = 0
    launches: int = 0
    time: int = 0
    idle: int = 0
    """of the GPU, right before kernels of this path"""


@dataclass
class Summary:
    """The table: a row per hot path."""

    rows: dict[str, Row]
    outside: dict[str, int] = field(default_factory=dict)
    """kernel -> its time in ns outside of every named range"""
    outside_idle: int = 0
    wall: int = 0
    """from the first kernel's start to the last one's end, in ns"""
    kernel_time: int = 0
    """of all kernels, in ns"""

    @property
    def coverage(self) -> float:
        """Share of the kernel time inside named ranges."""
        return sum(row.time for row in self.rows.values()) / self.kernel_time if self.kernel_time else 0.0


def hot_path(name: str) -> str | None:
    """The row of a range as nsys prints it, `domain:name`; None for steps and other libraries' ranges.

    An op's range is its own row (`attention/fwd/triton`), a phase's row is its first word (`student`).
    """
    domain, _, name = name.partition(":")
    if domain == OPS:
        return name
    phase = name.split("/")[0]
    return phase if domain == PHASES and phase != STEP else None


def read_reports(files: Iterable[str | Path]) -> dict[str, list[dict[str, str]]]:
    """Report name -> its lines. ValueError for a file that is none of `REPORTS`."""
    found: dict[str, list[dict[str, str]]] = {}
    for file in files:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        for place, line in enumerate(lines):  # what nsys says before the header is skipped
            columns = next(csv.reader([line]), [])
            names = [name for name, wanted in REPORTS.items() if set(wanted) <= set(columns)]
            if names:
                found[names[0]] = list(csv.DictReader(lines[place:]))
                break
        else:
            known = ", ".join(REPORTS)
            raise ValueError(f"nsys: {file} must be one of {known} as CSV in ns, got other columns")
    if missing := [name for name in REPORTS if name not in found]:
        raise ValueError(f"nsys: report {missing[0]} is missing; nsys stats skips those without data")
    return found


def _thread(line: dict[str, str]) -> Thread:
    return Thread(int(line["PID"]), int(line["TID"]))


def summarise(reports: dict[str, list[dict[str, str]]]) -> Summary:
    """Every kernel of the reports in the row of its hot path."""
    ranges = []
    for line in reports["nvtx_pushpop_trace"]:
        path = hot_path(line["Name"])
        if path is not None:
            ranges.append(Range(path, int(line["Start (ns)"]), int(line["End (ns)"]), _thread(line)))
    launches = [
        Launch(
            int(line["API Start (ns)"]),
            _thread(line),
            int(line["DevId"]),
            int(line["Kernel Start (ns)"]),
            int(line["Kernel Dur (ns)"]),
            line["Kernel Name"],
        )
        for line in reports["cuda_kern_exec_trace"]
    ]
    if not ranges:
        raise ValueError(f"nsys: nvtx_pushpop_trace has no range of the domains {PHASES}, {OPS}")
    if not launches:
        raise ValueError("nsys: cuda_kern_exec_trace has no kernel")
    summary = _table(ranges, launches)
    # Kernels without a recorded launch are in the sum only: they count as outside of every range.
    total = sum(int(line["Total Time (ns)"]) for line in reports["cuda_gpu_kern_sum"])
    if total > summary.kernel_time:
        summary.outside["(launch not recorded)"] = total - summary.kernel_time
        summary.kernel_time = total
    return summary


def _table(ranges: list[Range], launches: list[Launch]) -> Summary:
    rows: defaultdict[str, Row] = defaultdict(Row)
    outside: defaultdict[str, int] = defaultdict(int)
    for opened in ranges:
        rows[opened.path].calls += 1
    busy_until: dict[int, int] = {}
    attributed = sorted(_attribute(ranges, launches), key=lambda pair: pair[0].start)
    summary = Summary(rows, outside)
    for launch, path in attributed:
        idle = max(0, launch.start - busy_until.get(launch.device, launch.start))
        end = launch.start + launch.duration
        busy_until[launch.device] = max(end, busy_until.get(launch.device, end))
        summary.kernel_time += launch.duration
        if path is None:
            outside[launch.kernel] += launch.duration
            summary.outside_idle += idle
        else:
            row = rows[path]
            row.launches += 1
            row.time += launch.duration
            row.idle += idle
    summary.wall = max(busy_until.values()) - attributed[0][0].start
    return summary


def _attribute(ranges: list[Range], launches: list[Launch]) -> Iterator[tuple[Launch, str | None]]:
    """Each kernel with its row, in order of launch."""
    threads: defaultdict[Thread, list[Range]] = defaultdict(list)
    for opened in sorted(ranges, key=lambda r: (r.start, -r.end), reverse=True):
        threads[opened.thread].append(opened)
    stacks = {thread: _Stack(coming) for thread, coming in threads.items()}
    for launch in sorted(launches, key=lambda one: one.called):
        for stack in stacks.values():
            stack.advance(launch.called)
        own = stacks[launch.thread].open if launch.thread in stacks else []
        others = [
            phase
            for thread, stack in stacks.items()
            if thread.pid == launch.thread.pid and (phase := _innermost_phase(stack.open)) is not None
        ]
        found = (
            next((opened for opened in own if opened.is_op), None)
            or _innermost_phase(own)
            or max(others, key=lambda opened: opened.start, default=None)
        )
        yield launch, None if found is None else found.path


@dataclass
class _Stack:
    """The ranges of one thread that are open at a time that only moves on."""

    coming: list[Range]
    """the next one last"""
    open: list[Range] = field(default_factory=list)
    """outermost first"""

    def advance(self, time: int) -> None:
        while self.coming and self.coming[-1].start <= time:
            following = self.coming.pop()
            self._close(following.start)
            self.open.append(following)
        self._close(time)

    def _close(self, time: int) -> None:
        while self.open and self.open[-1].end <= time:
            self.open.pop()


def _innermost_phase(opened: list[Range]) -> Range | None:
    return next((one for one in reversed(opened) if not one.is_op), None)


def table(summary: Summary, steps: int) -> list[str]:
    """Lines of text: hot paths by time, per step; then the coverage and what lies outside."""
    width = max(len(path) for path in [*summary.rows, "outside named ranges"])
    lines = [f"{'hot path':<{width}} {'ms':>9} {'share':>6} {'calls':>7} {'launches':>8} {'us each':>9} "
             f"{'idle ms':>8}   per step of {steps}"]  # fmt: skip
    total = max(1, summary.kernel_time)

    def line(name: str, time: int, calls: str, launches: int, idle: int) -> str:
        each = f"{time / launches / 1e3:.2f}" if launches else "-"
        return (
            f"{name:<{width}} {time / steps / 1e6:>9.3f} {time / total:>6.1%} {calls:>7} "
            f"{f'{launches / steps:g}' if launches else '-':>8} {each:>9} {idle / steps / 1e6:>8.3f}"
        )

    for path, row in sorted(summary.rows.items(), key=lambda item: -item[1].time):
        lines.append(line(path, row.time, f"{row.calls / steps:g}", row.launches, row.idle))
    outside = sum(summary.outside.values())
    lines.append(line("outside named ranges", outside, "-", 0, summary.outside_idle))
    lines.append(
        f"kernels run {summary.kernel_time / steps / 1e6:.3f} of {summary.wall / steps / 1e6:.3f} ms a step; "
        f"{summary.coverage:.2%} of that inside named ranges, at least {WANTED:.0%} wanted"
    )
    for kernel, time in sorted(summary.outside.items(), key=lambda item: -item[1])[:5]:
        lines.append(f"  outside: {time / total:>6.2%} {kernel[:90]}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when too much of the kernel time lies outside; 2 for files that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m d2v.tools.nsys",
        description="Time, launches and idle gaps per hot path, from reports of `nsys stats --format csv`.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help=f"CSV files: {', '.join(REPORTS)}")
    parser.add_argument("--steps", type=int, default=1, help="captured steps, to divide by (default 1)")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"--steps must be positive, got {given.steps}")
    try:
        summary = summarise(read_reports(given.files))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(table(summary, given.steps)))
    return int(summary.coverage < WANTED)


if __name__ == "__main__":
    sys.exit(main())
