"""Measure an op's backends against each other on the machine at hand and write d2vkern/measured.json.

    python -m benchmarks.choose                            base presets, fp32 and bf16, student and teacher
    python -m benchmarks.choose --presets audio_large --precision bf16
    python -m benchmarks.choose --dry-run                  list the buckets and who would be measured

Auto goes by that table (d2vkern/_measured.py). Every case of benchmarks/bench_<op>.py falls into a bucket.
Its backends pass the benchmarks' gate, then take turns (benchmarks/harness.py), forward and backward where
the case has one; a bucket that several cases share holds the sum of their medians. A bucket is written only
when the fastest is ahead of the next by more than CLEAR, or else it is left to the default order. Only this
machine's part of the table and, in it, only the buckets that were measured are replaced.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Inputs, Outputs, Settings, make_inputs
from benchmarks.harness import Variant, measure_case
from benchmarks.machine import provenance
from benchmarks.report import write_json
from benchmarks.run import BASE, PRECISIONS
from benchmarks.shapes import Size
from d2v.config.presets import PRESETS
from d2v.train.process import tune_allocator
from d2vkern import _measured
from d2vkern._backend import REGISTRY, BackendError
from d2vkern._measured import Times, record_buckets

CLEAR = 0.1
"""share of the fastest's time by which the next one must be slower"""
FACTS = ("cpu", "gpu", "driver", "threads", "torch", "triton", "commit", "date")
"""what the table keeps of the provenance"""


def cases_of(presets: Iterable[str], size: Size, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, Case]]:
    """(op, case) of every op that auto has buckets for."""
    for stem in _measured.BUCKETS:
        bench = importlib.import_module(f"benchmarks.bench_{stem}")
        for preset in presets:
            for dtype in dtypes:
                for case in bench.cases(preset, size, dtype):
                    yield stem, case


def bucket_of(case: Case, settings: Settings) -> str:
    """The bucket that a call of the case falls into."""
    with record_buckets() as asked:
        case.call(make_inputs(case, settings, 0), None)
    return asked[0]


def backends_of(stem: str, case: Case, settings: Settings) -> list[Variant]:
    """Backends that take the case, eager first; each is asked by a call. Interpreted kernels are left out."""
    inputs, found = make_inputs(case, settings, 0), []
    for name in sorted(REGISTRY[stem], key=lambda name: name != "eager"):
        if name == "triton" and settings.device.type == "cpu":
            continue
        try:
            case.call(inputs, name)
        except BackendError:
            continue
        found.append(Variant(name, True, partial(_run, case, name), optional=True))
    return found


def _run(case: Case, backend: str, inputs: Inputs) -> Outputs:
    return case.call(inputs, backend)


def measure(stem: str, case: Case, settings: Settings, variants: list[Variant]) -> Times:
    """Median microseconds of every backend that passes the gate, with backward where the case has one."""
    rows = measure_case(stem, case, settings, variants)
    times = {}
    for row in rows:
        if row["direction"] != rows[-1]["direction"]:
            continue
        if row["status"] == "ok":
            times[row["variant"]] = row["us"]
        else:
            print(f"    {row['variant']}: {row['status']}: {row['reason']}")
    return times


def together(times: Sequence[Times]) -> Times:
    """The times of one bucket from those of its cases: sums, of backends that took all of them."""
    shared = [name for name in times[0] if all(name in one for one in times)]
    return {name: sum(one[name] for one in times) for name in shared}


def is_clear(times: Times) -> bool:
    """Whether there is a choice, and the fastest is far enough ahead."""
    ranked = sorted(times.values())
    return len(ranked) > 1 and ranked[1] > ranked[0] * (1 + CLEAR)


def write(path: Path, where: str, about: dict[str, Any], measured: dict[tuple[str, str], Times]) -> None:
    """Replace the measured buckets of one machine: those without a clear winner vanish."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ops = {stem: dict(buckets) for stem, buckets in table.get(where, {}).get("ops", {}).items()}
    for (stem, bucket), times in measured.items():
        ops.setdefault(stem, {}).pop(bucket, None)
        if is_clear(times):
            ops[stem][bucket] = {name: float(f"{times[name]:.4g}") for name in sorted(times)}
    ops = {stem: dict(sorted(buckets.items())) for stem, buckets in ops.items() if buckets}
    table.pop(where, None)
    if ops:
        table[where] = {"about": about, "ops": ops}
    write_json(path, dict(sorted(table.items())))
    _measured.read_table.cache_clear()


def load() -> list[float]:
    """Processes that wanted a core, over 1 and 5 minutes."""
    return [round(value, 2) for value in os.getloadavg()[:2]]


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=BASE)
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=["fp32", "bf16"])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each backend, at least 2")
    parser.add_argument("--smoke", action="store_true", help="toy sizes and few turns; means nothing")
    parser.add_argument("--dry-run", action="store_true", help="list buckets and backends, measure nothing")
    parser.add_argument("--table", type=Path, default=_measured.TABLE, help="default: d2vkern/measured.json")
    args = parser.parse_args(arguments)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    device = torch.device(args.device)
    tune_allocator()
    size: Size = "smoke" if args.smoke else ("gpu" if device.type == "cuda" else "cpu")
    quick: dict[str, Any] = {"turn_seconds": 0.0, "budget_seconds": 0.2, "most_sets": 1} if args.smoke else {}
    settings = Settings(device=device, compile=False, rounds=args.rounds, **quick)
    where, before = _measured.machine(device.type), load()
    found: dict[tuple[str, str], list[Times]] = {}
    for stem, case in cases_of(args.presets, size, [PRECISIONS[name] for name in args.precision]):
        bucket = bucket_of(case, settings)
        print(f"{stem}, {bucket}: {case.name}, {case.preset}, {case.shape}", flush=True)
        variants = backends_of(stem, case, settings)
        if args.dry_run or len(variants) < 2:
            print(f"    {', '.join(variant.name for variant in variants)}")
            continue
        times = measure(stem, case, settings, variants)
        for name in sorted(times, key=times.__getitem__):
            print(f"    {name}: {times[name]:.1f} us", flush=True)
        found.setdefault((stem, bucket), []).append(times)
    if args.dry_run:
        return 0
    facts = provenance(device)
    about = {name: facts[name] for name in FACTS} | {"load before": before, "load after": load()}
    measured = {key: together(times) for key, times in found.items()}
    write(args.table, where, about, measured)
    clear = sum(map(is_clear, measured.values()))
    print(f"{where}: {clear} of {len(measured)} buckets have a clear winner, load {before} to {load()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
