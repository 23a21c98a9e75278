"""Benchmarks of every op and of whole steps: prints tables, writes JSON, compares with older results.

    python -m benchmarks.run                                   all ops at the base presets
    python -m benchmarks.run --ops attention mlp --presets image_base --out new.json
    python -m benchmarks.run --out new.json --compare benchmarks/results/old.json --fail-if-slower 5%
    python -m benchmarks.run --from new.json --compare old.json    no measuring
    python -m benchmarks.run --ops step                        whole training steps on a CPU (minutes)
    python -m benchmarks.run --smoke                           all paths at toy sizes, to see that they work

Exit code 1: a variant failed its gate or crashed, or --compare found one of ours slower. What is measured and
how stands in benchmarks/harness.py. The default on a GPU is bf16 at its batches, on a CPU fp32 at one sample.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_step
from benchmarks.cases import Settings
from benchmarks.harness import measure_case
from benchmarks.machine import provenance
from benchmarks.report import SCHEMA, add_ceilings, compare, table
from benchmarks.shapes import Size
from d2v.cpu import tune_allocator
from d2v.machine import rates
from d2v.presets import PRESETS
from d2vkern._backend import STEMS

BASE = ["image_base", "audio_base", "text_base"]
TINY = ["image_tiny", "audio_tiny", "text_tiny"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure_ops(
    stems: list[str], presets: list[str], dtypes: list[torch.dtype], size: Size, settings: Settings
) -> list[dict[str, Any]]:
    """Rows of all cases, each printed when it is done; a case that two precisions share is measured once."""
    rows: list[dict[str, Any]] = []
    seen = set()
    smoke = size == "smoke"
    for stem in stems:
        bench = importlib.import_module(f"benchmarks.bench_{stem}")
        for preset in presets:
            for dtype in dtypes:
                for case in bench.cases(preset, size, dtype):
                    key = (case.op, case.name, case.preset, case.shape, case.dtype)
                    if key in seen:
                        continue
                    seen.add(key)
                    ceiling = rates(settings.device, [case.dtype], quick=smoke)
                    measured = measure_case(stem, case, settings)
                    again = rates(settings.device, [case.dtype], quick=smoke)
                    copy, matmul = ((ceiling[name] + again[name]) / 2 for name in ("copy", str(case.dtype)))
                    name = str(case.dtype).removeprefix("torch.")
                    add_ceilings(measured, copy, {name: matmul})
                    for row in measured:
                        row |= {"copy_GB/s": copy / 1e9, "matmul_GFLOP/s": matmul / 1e9}
                    print(table(measured), flush=True)
                    rows += measured
                    gc.collect()
                    if settings.device.type == "cuda":
                        torch.cuda.empty_cache()
    return rows


def measure_steps(
    presets: list[str], precisions: list[str], threads: int, steps: int
) -> list[dict[str, Any]]:
    """Whole training steps on this CPU, each case in a process of its own (benchmarks/bench_step.py)."""
    found = []
    for preset in presets:
        for precision in precisions:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                result = pool.submit(bench_step.measure, preset, precision, steps, threads).result()
            print(
                f"step, {preset}, {precision}: {result['seconds']:.2f} s, {result['GFLOP/s']:.0f} GFLOP/s, "
                f"{result['share_of_own_matmul']:.0%} of the matmul rate, {result['peak_MiB']:.0f} MiB",
                flush=True,
            )
            found.append(result)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    args = _parse(arguments)
    if args.source is not None:
        results = json.loads(args.source.read_text())
        print(table(results["rows"]))
    else:
        results = _measure(args)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    failed = [row for row in results["rows"] if row["status"] == "failed"]
    for row in failed:
        print(f"FAILED {row['op']} ({row['case']}), {row['preset']}, {row['variant']}: {row['reason']}")
    worse = False
    if args.compare is not None:
        lines, worse = compare(json.loads(args.compare.read_text()), results, args.fail_if_slower)
        print("\nnew time over old, against " + str(args.compare), *lines, sep="\n")
    return 1 if failed or worse else 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tune_allocator()
    size: Size = "smoke" if args.smoke else ("gpu" if device.type == "cuda" else "cpu")
    quick: dict[str, Any] = (
        {"rounds": 3, "turn_seconds": 0.0, "budget_seconds": 0.5, "most_sets": 2} if args.smoke else {}
    )
    if args.rounds is not None:
        quick["rounds"] = args.rounds
    settings = Settings(device=device, compile=not (args.no_compile or args.smoke), **quick)
    presets = args.presets or (TINY if args.smoke else BASE)
    precisions = args.precision or ["bf16" if device.type == "cuda" else "fp32"]
    stems = [name for name in args.ops or STEMS if name != "step"]
    ceilings = rates(device, [PRECISIONS[name] for name in precisions], quick=args.smoke)
    print(f"copy {ceilings['copy'] / 1e9:.4g} GB/s", end="")
    for name in precisions:
        print(f", {name} matmul {ceilings[str(PRECISIONS[name])] / 1e9:.4g} GFLOP/s", end="")
    print(f", {torch.get_num_threads()} threads, {device.type}")
    rows = measure_ops(stems, presets, [PRECISIONS[name] for name in precisions], size, settings)
    steps = []
    if "step" in (args.ops or []):
        at = [name for name in presets if name in bench_step.CASES]
        steps = measure_steps(at, precisions, torch.get_num_threads(), 1 if args.smoke else 3)
    return {
        "schema": SCHEMA,
        "provenance": provenance(device) | {"size": size, "rounds": settings.rounds},
        "rates": {"copy_GB/s": ceilings["copy"] / 1e9}
        | {f"{name}_GFLOP/s": ceilings[str(PRECISIONS[name])] / 1e9 for name in precisions},
        "rows": rows,
        "steps": steps,
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ops", nargs="+", choices=[*STEMS, "step"], help="all ops when absent")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS))
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS))
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice when absent")
    parser.add_argument("--rounds", type=int, help="turns of each variant, at least 2 (default 9)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--smoke", action="store_true", help="toy sizes and tiny presets, no torch.compile")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--from", dest="source", type=Path, help="results to show instead of measuring")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="results of an earlier run")
    parser.add_argument(
        "--fail-if-slower",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="of --compare: 5%% (default), or 0.05",
    )
    args = parser.parse_args(arguments)
    if args.rounds is not None and args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if "step" in (args.ops or []) and args.device != "cpu":
        parser.error("--ops step runs on a CPU only, add --device cpu")
    return args


def _share(text: str) -> float:
    """'5%' or '0.05' as 0.05."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


if __name__ == "__main__":
    sys.exit(main())
