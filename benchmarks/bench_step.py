"""Whole training steps through the trainer: eager, torch.compile, ours; fp32 and bf16; a CPU or a GPU.

    python -m benchmarks.bench_step                                   three base presets on this device
    python -m benchmarks.bench_step --presets image_base --precision bf16 --variants eager compile
    python -m benchmarks.bench_step --device cuda --resume --out benchmarks/results/step_cuda.json
    python -m benchmarks.bench_step --smoke --variants eager          tiny presets, to see that it works

A step is everything a run does between two batches (`Trainer.step`), at the batches of step_cases.py, with
layer drop 0. Each variant runs in a process of its own, so that its peak memory is its own; on a CPU the
variants of a preset take turns, on a GPU, whose memory they would share, one follows the other. The matmul
rate is measured before and after in the same process, and model FLOPs (`d2v.tools.flops.step_flops`) per
second are given as a share of it. The first steps, compilation and warm-up, are timed apart.

No variant gets a number unless loss and gradient norm of its first steps are eager's within `TOLERANCE`, in
the config that step_cases.py makes for that. What cannot run is a row with the reason. Prints a line per
variant; writes JSON with provenance and the share of each hot path in the eager step. Exit code 1: something
failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_worker
from benchmarks.machine import provenance
from benchmarks.report import check_same_machine, write_json
from benchmarks.step_cases import DEFAULT_VARIANTS, ORIGINAL, VARIANTS, Case, Precision, size_of
from d2v.config.presets import PRESETS
from d2v.train import cuda_graph

GATE_STEPS = {"cpu": 3, "cuda": cuda_graph.WARMUP + 3}
"""so many that some are replays of a CUDA graph"""
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""relative. In the tiny models another order of summation makes 1e-6, bf16 instead of fp32 3e-3, a learning
rate 10% off 2e-3 to 2e-2, a teacher that is not updated 3e-4 to 2e-3."""
DEFAULT_STEPS = {"cpu": 3, "cuda": 20}
MOST_WORDS = 300
"""characters of an error that are kept"""


@dataclass(frozen=True)
class Settings:
    """What is common to all cases of a run."""

    device: str
    variants: Sequence[str]
    steps: int
    threads: int | None = None
    smoke: bool = False
    hot_paths: bool = True

    @property
    def turns(self) -> int:
        return math.ceil(self.steps / step_worker.TURN[self.device])


class Worker:
    """A process for one case. What goes wrong in it is kept as the reason why the case has no number."""

    def __init__(self, case: Case) -> None:
        self.case, self.reason = case, ""
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result there; None once something went wrong."""
        if self.reason:
            return None
        try:
            return self._pool.submit(function, *arguments).result()
        except Exception as error:
            words = " ".join(str(error).split())
            self.reason = f"{type(error).__name__}: {words[:MOST_WORDS]}"
            return None

    def stop(self) -> None:
        self._pool.shutdown()


def measure(preset: str, precision: Precision, settings: Settings) -> list[dict[str, Any]]:
    """A row for each variant of one preset and precision."""
    batch = size_of(preset, settings.device, settings.smoke).batch
    cases = [
        Case(preset, precision, name, settings.device, batch, settings.smoke, settings.threads)
        for name in settings.variants
    ]
    able = [case for case in cases if not _unavailable(case)]
    rows = {
        case.key: identity(case) | {"status": "skipped", "reason": _unavailable(case)}
        for case in cases
        if case not in able
    }
    gate = Gate()
    for group in [able] if settings.device == "cpu" else [[case] for case in able]:
        rows |= {row_key(row): row for row in _measure_together(group, settings, gate)}
    found = [rows[case.key] for case in cases]
    eager = next((row for row in found if row["variant"] == "eager" and row["status"] == "ok"), None)
    for row in found:
        if eager is not None and row["status"] == "ok":
            row["against_eager"] = row["samples/s"] / eager["samples/s"]
    return found


def _unavailable(case: Case) -> str:
    return "needs a CUDA device" if case.how.cuda_graph and case.device != "cuda" else ""


def _measure_together(cases: list[Case], settings: Settings, gate: Gate) -> list[dict[str, Any]]:
    """Rows of cases that take turns, each in its own process."""
    workers = [Worker(case) for case in cases]
    try:
        for worker in workers:
            worker.call(step_worker.open_case, worker.case)
        for _ in range(settings.turns):
            for worker in workers:
                worker.call(step_worker.turn, worker.case)
        return [_row(worker, settings, gate) for worker in workers]
    finally:
        for worker in workers:
            worker.stop()


def _row(worker: Worker, settings: Settings, gate: Gate) -> dict[str, Any]:
    """The row of a case whose turns are over: its numbers if it passes the gate."""
    case = worker.case
    seen = worker.call(step_worker.close_case, case)
    if seen is None:
        return identity(case) | {"status": "failed", "reason": worker.reason}
    if case.variant == "auto" and set(seen["backends"].values()) == {"eager"}:
        return identity(case) | {"status": "skipped", "reason": "auto chooses eager for every op here"}
    row = numbers(case, seen)
    case = dataclasses.replace(case, batch=seen["batch"])
    try:
        row["gate"] = gate.check(case, worker)
    except AssertionError as error:
        return identity(case) | {"status": "failed", "reason": f"gate: {error}"}
    if case.variant == "eager" and settings.hot_paths:
        found = worker.call(step_worker.hot_paths, case, 1 if settings.smoke else 2)
        row["hot_paths"] = {"reason": worker.reason} if found is None else found
    return row


def row_key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["preset"], row["precision"], row["variant"]


def identity(case: Case) -> dict[str, Any]:
    """What a row begins with."""
    return {
        "preset": case.preset,
        "precision": case.precision,
        "variant": case.variant,
        "ours": case.how.ours,
    }


def numbers(case: Case, seen: dict[str, Any]) -> dict[str, Any]:
    """A row with what `step_worker.close_case` returned."""
    case = dataclasses.replace(case, batch=seen["batch"])
    seconds = statistics.median(seen["turns"])
    rate = {name: statistics.mean(one[name] for one in seen["rates"]) for name in seen["rates"][0]}
    row = identity(case) | {
        "status": "ok",
        "batch": case.batch,
        "shape": list(case.shape),
        "GFLOP": case.flops / 1e9,
        "seconds": seconds,
        "all_seconds": seen["turns"],
        "warmup_seconds": seen["warmup_seconds"],
        "samples/s": case.batch / seconds,
        "GFLOP/s": case.flops / seconds / 1e9,
        "share_of_fp32_matmul": case.flops / seconds / rate["fp32"],
        "share_of_own_matmul": case.flops / seconds / rate[case.precision],
        "matmul_GFLOP/s": {name: [one[name] / 1e9 for one in seen["rates"]] for name in rate},
        "peak_MiB": seen["peak"] / (1 << 20),
        "losses": seen["losses"],
        "backends": seen["backends"],
    }
    if "out_of_memory_at" in seen:
        row["out_of_memory_at"] = seen["out_of_memory_at"]
    if case.original is not None:
        row["original"] = case.original
    return row


class Gate:
    """Holds first steps against eager's, of the same preset and precision; asks for eager's once a batch."""

    def __init__(self) -> None:
        self._eager: dict[int, dict[str, list[float]]] = {}

    def check(self, case: Case, worker: Worker) -> dict[str, Any]:
        """What the row says about its gate. Raises AssertionError naming the first value that differs."""
        steps = GATE_STEPS[case.device]
        actual = worker.call(step_worker.trajectory, case, steps)
        if actual is None:
            raise AssertionError(worker.reason)
        if case.variant == "eager":
            self._eager[case.batch] = actual
        elif case.batch not in self._eager:
            other = Worker(dataclasses.replace(case, variant="eager"))
            found = other.call(step_worker.trajectory, other.case, steps)
            other.stop()
            if found is None:
                raise AssertionError(f"eager has no losses to compare with: {other.reason}")
            self._eager[case.batch] = found
        limit = TOLERANCE[case.precision]
        worst = compare(actual, self._eager[case.batch], limit)
        return {"steps": steps, "tolerance": limit, "worst": worst, **actual}


def compare(actual: dict[str, list[float]], eager: dict[str, list[float]], limit: float) -> float:
    """Largest relative difference. Raises AssertionError for one above the limit and for NaN."""
    worst = 0.0
    for name, expected in eager.items():
        for step, (ours, theirs) in enumerate(zip(actual[name], expected, strict=True), start=1):
            error = abs(ours - theirs) / abs(theirs)
            if not error <= limit:
                raise AssertionError(
                    f"{name} of step {step} is {ours:.7g}, eager's is {theirs:.7g}: off by {error:.1e}, "
                    f"more than {limit:g}"
                )
            worst = max(worst, error)
    return worst


def measure_all(
    presets: Sequence[str],
    precisions: Sequence[Precision],
    settings: Settings,
    done: Sequence[dict[str, Any]] = (),
    save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Rows of all cases, each printed when it is known. done: rows of an earlier run, measured no more.

    save: called with all rows so far after each preset and precision.
    """
    rows = list(done)
    known = {row_key(row) for row in rows}
    for preset in presets:
        for precision in precisions:
            if all((preset, precision, name) in known for name in settings.variants):
                continue
            fresh = measure(preset, precision, settings)
            rows = [row for row in rows if row_key(row) not in {row_key(one) for one in fresh}] + fresh
            for row in fresh:
                print(line(row), flush=True)
            save(rows)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    head = f"step, {', '.join(row_key(row))}: "
    if row["status"] != "ok":
        return f"{head}{row['status']}: {row['reason']}"
    parts = [
        f"{row['seconds']:.4g} s",
        f"{row['samples/s']:.4g} samples/s",
        f"{row['GFLOP/s']:.4g} GFLOP/s = {row['share_of_own_matmul']:.0%} of the matmul rate",
        f"peak {row['peak_MiB']:.0f} MiB",
        f"warm-up {row['warmup_seconds']:.1f} s",
        f"gate {row['gate']['worst']:.0e}",
    ]
    if "against_eager" in row:
        parts.append(f"{row['against_eager']:.2f} times as fast as eager")
    if "out_of_memory_at" in row:
        parts.append(f"out of memory at a batch of {row['out_of_memory_at']}")
    return head + ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = _parse(arguments)
    settings = Settings(
        args.device, args.variants, args.steps, args.threads, args.smoke, not args.no_hot_paths
    )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "provenance": provenance(torch.device(args.device))
        | {"size": "smoke" if args.smoke else args.device},
        "settings": {"layerdrop": 0.0, "steps": settings.turns * step_worker.TURN[args.device]},
        "complete": False,
        "results": [],
    }
    if args.resume and args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        check_same_machine(before["provenance"], results["provenance"])
        results["results"] = [row for row in before["results"] if row["status"] != "failed"]

    def save(rows: list[dict[str, Any]], complete: bool = False) -> None:
        results.update(results=rows, complete=complete)
        if args.out is not None:
            write_json(args.out, results)

    save(measure_all(args.presets, args.precision, settings, results["results"], save), complete=True)
    return int(any(row["status"] == "failed" for row in results["results"]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=["cpu", "cuda"])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), help="the base ones; --smoke: tiny")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], help="both on a CPU, bf16 on a GPU"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), help="what the device is measured with"
    )
    parser.add_argument("--steps", type=int, help="timed steps (3 on a CPU, 20 on a GPU)")
    parser.add_argument("--threads", type=int, help="of the CPU (there at most 2, as for the original)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, whose numbers mean nothing")
    parser.add_argument("--no-hot-paths", action="store_true", help="leave out the shares of the eager step")
    parser.add_argument("--out", type=Path, help="write JSON here, anew after each preset and precision")
    parser.add_argument("--resume", action="store_true", help="measure only what --out does not hold")
    args = parser.parse_args(arguments)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be positive, got {args.steps}")
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    tiny = [name.replace("base", "tiny") for name in ORIGINAL]
    args.presets = args.presets or (tiny if args.smoke else list(ORIGINAL))
    args.precision = args.precision or (["bf16"] if args.device == "cuda" else ["fp32", "bf16"])
    args.variants = args.variants or DEFAULT_VARIANTS[args.device]
    args.steps = args.steps or (1 if args.smoke else DEFAULT_STEPS[args.device])
    if args.device == "cpu":
        args.threads = args.threads or min(2, torch.get_num_threads())
    return args


if __name__ == "__main__":
    sys.exit(main())
