"""What the ranks of a log line cost: `d2v.train.health.effective_rank` beside the singular values it stands
for, and what a line of three of them adds to the steps around it.

    OMP_NUM_THREADS=1 python -m benchmarks.log_line [--device cuda] [--rounds 9]

All take turns in one process; medians. First the ms of one rank, and how far the two are apart. Then the ms
of two steps (fp32 products) with nothing between them, with three singular value decompositions, with three
ranks, and with the line as a run writes it: the ranks on a thread of their own, awaited after the second
step.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.train.health import effective_rank
from d2v.train.progress import Progress

SHAPES = ((512, 1024), (512, 768), (150, 768), (512, 96), (512, 64))
"""rows [n, D] of large, base and tiny presets, and of the whole tokens of two short utterances"""
LINE_SHAPES = ((512, 1024), (512, 768))
STEP_MS = 120
"""about the time of a step; longer than the ranks of a line take on one core"""


def rank_of_svd(rows: Tensor) -> Tensor:
    """The same rank by singular values, in fp64 on the CPU."""
    centred = rows.detach().cpu().double()
    scale = centred.abs().amax()
    values = torch.linalg.svdvals(centred - centred.mean(dim=0))
    values = values[values > 1e-7 * scale * max(centred.shape) ** 0.5]
    return torch.special.entr(values / values.sum()).sum().exp()


def timed(rank: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[float, float]:
    """Seconds until the rank is on the host, and the rank."""
    began = time.perf_counter()
    found = rank(rows).item()
    return time.perf_counter() - began, found


def compare_ranks(rows: Tensor, rounds: int) -> None:
    seconds: dict[str, list[float]] = {"svd": [], "gram": []}
    for _ in range(rounds + 1):
        spent, expected = timed(rank_of_svd, rows)
        seconds["svd"].append(spent)
        spent, found = timed(effective_rank, rows)
        seconds["gram"].append(spent)
    svd, gram = (1e3 * statistics.median(some[1:]) for some in seconds.values())
    print(f"{rows.shape[0]:>4} x {rows.shape[1]:<4} svd {svd:7.2f} ms  gram {gram:6.2f} ms  "
          f"{svd / gram:5.1f} times faster  {abs(found / expected - 1):.0e} apart")  # fmt: skip


class Steps:
    """Products on the device that take about `STEP_MS`."""

    def __init__(self, device: str) -> None:
        self.a = torch.randn(1024, 1024, device=device) / 32
        self.products = 8
        self()
        began = time.perf_counter()
        self()
        self.products = max(1, round(self.products * STEP_MS / 1e3 / (time.perf_counter() - began)))

    def __call__(self) -> None:
        x = self.a
        for _ in range(self.products):
            x = x @ self.a
        x.sum().item()


def compare_lines(rows: Tensor, step: Steps, rounds: int) -> None:
    parts = [rows, rows + 1, rows * 2]

    def columns(some: list[Tensor], rank: Callable[[Tensor], Tensor]) -> tuple[dict[str, Any], list[str]]:
        return {f"rank{i}": rank(x).item() for i, x in enumerate(some)}, []

    def beside(progress: Progress) -> None:
        on_host = [x.cpu() for x in parts]
        progress.log({"step": 1, "loss": 0.0}, lambda: columns(on_host, effective_rank))

    between: dict[str, Callable[[Progress], object]] = {
        "nothing": lambda progress: None,
        "svd": lambda progress: columns(parts, rank_of_svd),
        "gram": lambda progress: columns(parts, effective_rank),
        "beside": beside,
    }
    seconds: dict[str, list[float]] = {name: [] for name in between}
    held: dict[str, list[float]] = {name: [] for name in between}
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(Path(folder), start=0, steps=2, unit="samples", stream=io.StringIO()) as progress,
    ):
        for _ in range(rounds + 1):
            for name, line in between.items():
                marks = [time.perf_counter()]
                for part in (step, lambda line=line: line(progress), step, progress.settle):
                    part()
                    marks.append(time.perf_counter())
                seconds[name].append(marks[4] - marks[0])
                held[name].append(marks[2] - marks[1] + marks[4] - marks[3])
    whole, waited = (
        {name: 1e3 * statistics.median(some[1:]) for name, some in times.items()} for times in (seconds, held)
    )
    listed = "  ".join(
        f"{name} {waited[name]:.2f} ({whole[name] - whole['nothing']:+.2f})" for name in list(between)[1:]
    )
    print(f"{rows.shape[0]:>4} x {rows.shape[1]:<4} two steps {whole['nothing']:.1f} ms; a line holds "
          f"them up for (they take longer by), ms: {listed}; beside the step "
          f"{waited['svd'] / waited['beside']:.0f} times less than svd")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.log_line", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    def rows(n: int, d: int) -> Tensor:
        return torch.randn(n, d, device=given.device) * torch.logspace(0, -2, d, device=given.device)

    for n, d in SHAPES:
        compare_ranks(rows(n, d), given.rounds)
    step = Steps(given.device)
    for n, d in LINE_SHAPES:
        compare_lines(rows(n, d), step, given.rounds)


if __name__ == "__main__":
    main()
