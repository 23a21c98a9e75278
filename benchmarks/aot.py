"""Ahead-of-time gate: every Triton kernel at every preset's shapes, compiled for GPUs that are not here.

    python -m benchmarks.aot                          all ops, presets, targets, precisions
    python -m benchmarks.aot --ops gather loss --presets image_base --targets sm_90 --json report.json
    python -m benchmarks.aot --sample                 every kernel once per target and precision
    python -m benchmarks.aot --candidates --no-eager  also configurations that tuning may choose
    python -m benchmarks.aot --sample --compiles      with another Triton: whether it takes the kernels at all

The public ops are called on meta tensors, forward and backward, and what they would start is compiled and
read (benchmarks/aot_build.py, aot_read.py). Exit code 1, with a line each: a build that fails, spills, asks
for more shared memory than a program gets, accesses memory narrower than it could, or exceeds its budget
(benchmarks/aot_budgets.py). Then the roofline on paper: bytes moved, floor, launches, and eager's
(benchmarks/aot_roofline.py). Then the CUDA kernels of csrc/, where there is an nvcc (benchmarks/aot_cuda.py).
What was compiled is kept in build/aot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import aot_cuda
from benchmarks.aot_budgets import BUDGETS
from benchmarks.aot_build import TARGETS, Build, build_of, compile_all
from benchmarks.aot_gate import (
    DOES_NOT_COMPILE,
    LIMITS,
    Use,
    narrow_accesses,
    problems,
    programs_per_multiprocessor,
)
from benchmarks.aot_read import Resources
from benchmarks.aot_record import (
    DTYPES,
    Record,
    arguments,
    cases_of,
    kernels_of,
    record,
    record_candidates,
    record_tuned,
    triton_stems,
    vector_bytes,
)
from benchmarks.aot_roofline import GOAL, LAUNCHES, PLAN_GOAL, Paper, on_paper
from benchmarks.aot_variants import variants
from benchmarks.cases import Case
from d2v.config.presets import PRESETS
from d2vkern.kernels._launch import Launch

SCHEMA = 1


@dataclass
class Users:
    """Who starts a build, and how wide the layouts of its tensors let it be."""

    names: list[str] = field(default_factory=list)
    use: Use = "candidate"
    vectors: dict[str, int] = field(default_factory=dict)


def users_of(records: Mapping[Use, Iterable[Record]], targets: Sequence[str]) -> dict[Build, Users]:
    """The distinct builds of all launches; records: the strictest use first."""
    found: dict[Build, Users] = {}
    for use, some in records.items():
        for each in some:
            name = f"{each.case.preset} {each.case.op} ({each.case.name}) {each.direction}"
            for launch in each.launches:
                for target in (one for one in targets if one in (each.targets or targets)):
                    users = found.setdefault(build_of(launch, target), Users(use=use))
                    if name not in users.names:
                        users.names.append(name)
                    for argument, value in arguments(launch).items():
                        if isinstance(value, Tensor):
                            known = users.vectors.get(argument, 0)
                            users.vectors[argument] = max(vector_bytes(value), known)
    return found


def sample(builds: Iterable[Build]) -> list[Build]:
    """The first build of each kernel, target and set of floating types."""
    chosen: dict[tuple[str, ...], Build] = {}
    for build in builds:
        chosen.setdefault((build.module, build.kernel, build.target, _pointers(build)), build)
    return list(chosen.values())


def findings(results: dict[Build, Resources | str], users: dict[Build, Users]) -> list[dict[str, Any]]:
    """One row per build, with what is wrong with it."""
    rows = []
    for build, found in results.items():
        by = users[build]
        row: dict[str, Any] = {"kernel": build.kernel, "target": build.target, "build": build.label}
        row |= {"pointers": _pointers(build), "use": by.use, "users": by.names}
        row["problems"] = problems(
            found,
            build.target,
            BUDGETS.get(build.kernel),
            by.vectors,
            by.use,
            row["pointers"],
            build.arguments,
        )
        if isinstance(found, Resources):
            row |= asdict(found)
            row["narrow"] = [access for access, *_ in narrow_accesses(found, by.vectors)]
            if build.target in LIMITS:
                row["programs"] = programs_per_multiprocessor(found, build.target)
                row["occupancy"] = row["programs"] * found.warps / LIMITS[build.target].warps
        rows.append(row)
    return rows


def resource_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Per kernel, target and pointer types: the worst over its builds, and the widths of all of them."""
    yield (
        "| kernel | pointers | target | builds | registers | spilled | shared KB | occupancy "
        "| loads and stores, bits | narrow |"
    )
    yield "|---|---|---|---:|---:|---:|---:|---:|---|---|"
    groups: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "registers" in row:
            groups[row["kernel"], row["pointers"], row["target"]].append(row)
    for (kernel, pointers, target), some in sorted(groups.items()):
        occupancy = f"{min(row['occupancy'] for row in some):.0%}" if target in LIMITS else ""
        yield (
            f"| {kernel} | {pointers} | {target} | {len(some)} | {_worst(some, 'registers')} "
            f"| {_worst(some, 'spilled')} | {_worst(some, 'shared') / 1024:.1f} | {occupancy} "
            f"| {_widths(some)} | {', '.join(sorted({name for row in some for name in row['narrow']}))} |"
        )


def roofline_table(papers: list[Paper]) -> Iterator[str]:
    """Markdown; MB are 1e6 bytes. A star: above the goal. The floor in us is that of bytes or of FLOPs."""
    yield (
        "| op | case | preset | dtype | direction | floor MB | GFLOP | floor us | moved MB | ratio | kernels "
        "| library calls | eager MB | over floor | eager allocates MB | eager calls |"
    )
    yield "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for paper in papers:
        eager = ["", "", "", ""]
        if paper.eager_moved is not None:
            over = f"{paper.eager_moved / paper.floor:.2f}" if paper.floor else ""
            eager = [_mb(paper.eager_moved), over, _mb(paper.eager_allocated), str(paper.eager_operators)]
        cells = [paper.op, paper.case, paper.preset, paper.dtype, paper.direction, _mb(paper.floor)]
        cells += [
            f"{paper.flops / 1e9:.4g}",
            f"{paper.floor_us:.1f}",
            _mb(paper.moved),
            _starred(paper),
            _launches(paper),
        ]
        yield f"| {' | '.join([*cells, str(paper.library), *eager])} |"


def product_table(papers: list[Paper]) -> Iterator[str]:
    """Markdown, one row per launch with matrix products; "all" counts the algorithm's FLOPs as useful.

    Plan: the passes of aot_budgets.PASSES. A star: more than PLAN_GOAL times those bytes.
    """
    yield (
        "| op | case | preset | dtype | direction | plan MB | moved over plan | kernel "
        "| useful GFLOP | issued GFLOP | useful over issued |"
    )
    yield "|---|---|---|---|---|---:|---:|---|---:|---:|---:|"
    for paper in papers:
        if not paper.issued:
            continue
        over = f"{paper.moved / paper.plan:.3f}" + "*" * (paper.moved > PLAN_GOAL * paper.plan)
        cells = [paper.op, paper.case, paper.preset, paper.dtype, paper.direction, _mb(paper.plan), over]
        total = sum(issued for _, _, issued in paper.issued)
        for kernel, useful, issued in (*paper.issued, ("all", paper.flops, total)):
            numbers = [f"{useful / 1e9:.4g}", f"{issued / 1e9:.4g}", f"{useful / issued:.3f}"]
            yield f"| {' | '.join([*cells, kernel, *numbers])} |"


def _starred(paper: Paper) -> str:
    """Bytes over the floor's, with a star above the goal where bytes are what takes the time."""
    if paper.ratio is None:
        return "no floor*" if paper.moved else ""
    return f"{paper.ratio:.3f}" + "*" * (paper.ratio > GOAL and paper.bound_by_bytes)


def _launches(paper: Paper) -> str:
    return f"{paper.kernels}" + "*" * (paper.kernels > LAUNCHES[paper.direction] * max(1, paper.calls))


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.4g}"


def _worst(rows: list[dict[str, Any]], name: str) -> Any:
    return max(row[name] for row in rows)


def _widths(rows: list[dict[str, Any]]) -> str:
    """ "LDG 128 x 12, 32 x 2; STG ..." of all builds together."""
    totals: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        for access, traffic in row["traffic"].items():
            for bits, _, count in traffic["blocks"]:
                totals[access.split(" ")[0]][bits] += count
    parts = []
    for kind, widths in sorted(totals.items()):
        counts = ", ".join(f"{count} x {bits}" for bits, count in sorted(widths.items(), reverse=True))
        parts.append(f"{kind} {counts}")
    return "; ".join(parts)


def _pointers(build: Build) -> str:
    kinds = {kind[1:] for _, kind in build.signature if kind.startswith("*")}
    floats = sorted(kind for kind in kinds if kind.startswith(("bf", "fp")))
    return "/".join(floats or sorted(kinds))


def _record_all(
    cases: Iterable[tuple[str, Case]], how: Callable[[str, Case], list[Record]], wrong: list[str]
) -> list[Record]:
    """All records; which cases do not get through, and why, goes to `wrong`."""
    records: list[Record] = []
    for stem, case in cases:
        try:
            records += how(stem, case)
        except Exception as error:  # whatever an op raises on meta tensors is a finding
            wrong.append(f"{case.op} ({case.name}), {case.preset}: {type(error).__name__}: {error}")
    return records


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the report holds."""
    wrong: list[str] = []
    cases = list(cases_of(args.ops, args.presets, args.dtypes))
    further = [
        (stem, case) for stem in args.ops for name in args.dtypes for case in variants(stem, DTYPES[name])
    ]
    records = _record_all(cases, record, wrong)
    tuned = _record_all(cases, record_tuned, wrong)
    if args.candidates:
        tuned += _record_all(cases, record_candidates, wrong)
    uses: dict[Use, list[Record]] = {
        "preset": records, "variant": _record_all(further, record, wrong), "candidate": tuned,
    }  # fmt: skip
    users = users_of(uses, args.targets)
    everything = args.sample or set(args.presets) == set(PRESETS)
    if everything and set(args.ops) == set(triton_stems()):  # what ops share may start for another op
        started = {build.kernel for build in users}
        wrong += [
            f"{name}: no case of the benchmarks or of benchmarks/aot_variants.py starts it"
            for name in sorted(kernels_of(args.ops) - started)
        ]
    results = compile_all(sample(users) if args.sample else users, args.processes)
    rows = findings(results, users)
    if args.compiles:
        for row in rows:
            row["problems"] = [text for text in row["problems"] if text.startswith(DOES_NOT_COMPILE)]

    def built(launch: Launch) -> Resources | str:
        return results.get(build_of(launch, reference), "left out")

    reference = next((target for target in args.targets if target in LIMITS), "")
    papers = []
    if reference and not args.sample and not args.compiles:
        papers = [on_paper(each, built, args.eager) for each in records]
    undeclared = sorted({access for paper in papers for access in paper.undeclared})
    wrong += [f"{access}: no bytes declared in TOUCHED (aot_budgets.py)" for access in undeclared]
    wrong += [
        f"{paper.op} ({paper.case}), {paper.preset}, {paper.dtype} {paper.direction}: moves "
        f"{paper.moved / paper.plan:.3f} times the bytes of its plan, allowed is {PLAN_GOAL}"
        for paper in papers
        if paper.plan and paper.moved > PLAN_GOAL * paper.plan
    ]
    wrong += [f"{row['target']} {row['build']}: {text}" for row in rows for text in row["problems"]]
    return {
        "schema": SCHEMA,
        "builds": rows,
        "papers": papers,
        "problems": wrong,
    }


def _add_cuda(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Rows "cuda" and the problems of csrc/*.cu, of the ops and targets asked for."""
    sources = [stem for stem in args.ops if stem in aot_cuda.SOURCES]
    targets = [name for name in aot_cuda.TARGETS if name.rstrip("a") in args.targets]
    if not sources or not targets:
        return
    if missing := aot_cuda.missing_tools():
        print(f"\ncsrc/*.cu left out: {missing}")
        return
    report["cuda"], wrong = aot_cuda.gate(sources, targets, processes=args.processes)
    report["problems"] += wrong
    print("\n" + "\n".join(aot_cuda.table(report["cuda"])))
    print(f"\n{len(report['cuda'])} builds of CUDA kernels, {len(wrong)} problems")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    args = _parse(arguments)
    report = run(args)
    print("\n".join(resource_table(report["builds"])))
    if report["papers"]:
        print("\n" + "\n".join(roofline_table(report["papers"])))
        if any(paper.issued for paper in report["papers"]):
            print("\n" + "\n".join(product_table(report["papers"])))
    if args.nvcc and not args.sample:
        _add_cuda(report, args)
    if args.json is not None:
        report["papers"] = [paper.as_row() for paper in report["papers"]]
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    kernels = {row["kernel"] for row in report["builds"]}
    print(f"\n{len(kernels)} kernels, {len(report['builds'])} builds, {len(report['problems'])} problems")
    for text in report["problems"]:
        print(f"FAILED {text}")
    return 1 if report["problems"] else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stems = triton_stems()
    parser.add_argument("--ops", nargs="+", choices=stems, default=stems, help="all ops when absent")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--sample", action="store_true", help="each kernel once per target and precision")
    parser.add_argument(
        "--candidates", action="store_true", help="also every configuration that tuning may choose"
    )
    parser.add_argument(
        "--compiles",
        action="store_true",
        help="fail for nothing else: with a Triton that budgets do not know",
    )
    parser.add_argument("--no-eager", dest="eager", action="store_false", help="leave eager's bytes out")
    parser.add_argument("--no-nvcc", dest="nvcc", action="store_false", help="leave csrc/*.cu out")
    parser.add_argument("--processes", type=int, default=2, help="that compile (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET must be unset: interpreted kernels are not compiled")
    return args


if __name__ == "__main__":
    sys.exit(main())
