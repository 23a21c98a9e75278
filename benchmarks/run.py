"""Benchmarks of every op and of whole steps: prints tables, writes JSON, compares with older results.

    python -m benchmarks.run                                   all ops at the base presets
    python -m benchmarks.run --ops attention mlp --presets image_base --out new.json
    python -m benchmarks.run --out new.json --compare benchmarks/results/old.json --fail-if-slower 5%
    python -m benchmarks.run --from new.json --compare old.json    no measuring
    python -m benchmarks.run --out new.json --resume           only the cases that new.json does not hold
    python -m benchmarks.run --ops step                        whole training steps (bench_step.py, minutes)
    python -m benchmarks.run --smoke                           all paths at toy sizes, to see that they work

Exit code 1: a variant failed its gate or crashed, or --compare found one of ours slower. What is measured and
how stands in benchmarks/harness.py. The default on a GPU is bf16 at its batches, on a CPU fp32 at one sample.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_step
from benchmarks.cases import Settings
from benchmarks.harness import measure_case
from benchmarks.machine import provenance
from benchmarks.report import SCHEMA, add_ceilings, check_same_machine, compare, table, write_json
from benchmarks.shapes import Size
from benchmarks.step_cases import DEFAULT_VARIANTS
from d2v.config.presets import PRESETS
from d2v.tools.ceilings import rates
from d2v.train.process import tune_allocator
from d2vkern._backend import STEMS

BASE = ["image_base", "audio_base", "text_base"]
TINY = ["image_tiny", "audio_tiny", "text_tiny"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure_ops(
    stems: list[str],
    presets: list[str],
    dtypes: list[torch.dtype],
    size: Size,
    settings: Settings,
    rows: list[dict[str, Any]],
    save: Callable[[], None],
) -> None:
    """Append the rows of all cases to `rows`, each printed and saved when it is done.

    Measured once are a case that two precisions share and one whose rows are there already.
    """
    seen = {_case(row) for row in rows}
    smoke = size == "smoke"
    for stem in stems:
        bench = importlib.import_module(f"benchmarks.bench_{stem}")
        for preset in presets:
            for dtype in dtypes:
                for case in bench.cases(preset, size, dtype):
                    name = str(case.dtype).removeprefix("torch.")
                    key = (case.op, case.name, case.preset, case.shape, name)
                    if key in seen:
                        continue
                    seen.add(key)
                    ceiling = rates(settings.device, [case.dtype], quick=smoke)
                    measured = measure_case(stem, case, settings)
                    again = rates(settings.device, [case.dtype], quick=smoke)
                    copy, matmul = ((ceiling[key] + again[key]) / 2 for key in ("copy", str(case.dtype)))
                    add_ceilings(measured, copy, {name: matmul})
                    for row in measured:
                        row |= {"copy_GB/s": copy / 1e9, "matmul_GFLOP/s": matmul / 1e9}
                    print(table(measured), flush=True)
                    rows += measured
                    save()
                    gc.collect()
                    if settings.device.type == "cuda":
                        torch.cuda.empty_cache()


def _case(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("op", "case", "preset", "shape", "dtype"))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    args = _parse(arguments)
    if args.source is not None:
        results = json.loads(args.source.read_text())
        print(table(results["rows"]))
    else:
        results = _measure(args)
    if args.out is not None:
        write_json(args.out, results)
    failed = [row for row in results["rows"] if row["status"] == "failed"]
    for row in failed:
        print(f"FAILED {row['op']} ({row['case']}), {row['preset']}, {row['variant']}: {row['reason']}")
    failed += [row for row in results["steps"] if row["status"] == "failed"]
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
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": provenance(device) | {"size": size, "rounds": settings.rounds},
        "rates": {"copy_GB/s": ceilings["copy"] / 1e9}
        | {f"{name}_GFLOP/s": ceilings[str(PRECISIONS[name])] / 1e9 for name in precisions},
        "complete": False,
        "rows": [],
        "steps": [],
    }
    if args.resume and args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        check_same_machine(before["provenance"], results["provenance"])
        failed = {_case(row) for row in before["rows"] if row["status"] == "failed"}
        results["rows"] = [row for row in before["rows"] if _case(row) not in failed]
        results["steps"] = [row for row in before["steps"] if row["status"] != "failed"]

    def save() -> None:
        if args.out is not None:
            write_json(args.out, results)

    def save_steps(rows: list[dict[str, Any]]) -> None:
        results["steps"] = rows
        save()

    measure_ops(
        stems, presets, [PRECISIONS[name] for name in precisions], size, settings, results["rows"], save
    )
    if "step" in (args.ops or []):
        variants = DEFAULT_VARIANTS[device.type] if settings.compile else ["eager"]
        count = 1 if args.smoke else bench_step.DEFAULT_STEPS[device.type]
        step = bench_step.Settings(device.type, variants, count, torch.get_num_threads(), args.smoke)
        bench_step.measure_all(presets, precisions, step, results["steps"], save_steps)
    results["complete"] = True
    return results


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
    parser.add_argument("--resume", action="store_true", help="measure only what --out does not hold")
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
    if "step" in (args.ops or []) and "fp16" in (args.precision or []):
        parser.error("--ops step runs in fp32 and bf16 only")
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    return args


def _share(text: str) -> float:
    """'5%' or '0.05' as 0.05."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


if __name__ == "__main__":
    sys.exit(main())
