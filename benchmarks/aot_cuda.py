"""Ahead-of-time gate for csrc/*.cu: every CUDA kernel compiled by nvcc for GPUs that are not here, and read.

    python -m benchmarks.aot_cuda                             all sources, all default architectures
    python -m benchmarks.aot_cuda --sources ema --targets sm_90a --json report.json
    python -m benchmarks.aot_cuda --lineinfo                  the debug build that profilers want: same code?

`python -m benchmarks.aot` runs it too where there is an nvcc. Exit code 1, with a line each: a source that
does not compile or warns, a kernel that spills, has a stack, local accesses or too many registers,
or has fewer 128-bit accesses inside its loops, or more narrow ones anywhere, than its budget says. What was
read is kept in build/aot, by the content of everything that was compiled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.aot_cuda_budgets import BUDGETS, CudaBudget
from benchmarks.aot_read import width_of

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "aot"
CSRC = ROOT / "csrc"
SOURCES = ("ema", "adamw_ema", "masks", "gather")
TARGETS = ("sm_80", "sm_90a", "sm_100")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",
    "-DD2V_WITH_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
STRICT = ("-Xptxas", "-v", "--Werror", "all-warnings", "-Xcompiler", "-Wall")


@dataclass
class Kernel:
    """What one kernel of one cubin needs, and how it reaches global memory."""

    name: str
    """with its template arguments: gather_fwd_kernel<Bf16, 8>"""
    target: str
    registers: int = 0
    spilled: int = 0
    """bytes of stack, spill stores and spill loads per thread"""
    local: int = 0
    """instructions that touch local memory"""
    shared: int = 0
    """bytes, dynamic ones left out"""
    loads: dict[int, int] = field(default_factory=dict)
    """bits per thread -> instructions from global memory"""
    stores: dict[int, int] = field(default_factory=dict)
    looped_loads: dict[int, int] = field(default_factory=dict)
    """those inside loops"""
    looped_stores: dict[int, int] = field(default_factory=dict)

    @property
    def function(self) -> str:
        return self.name.partition("<")[0]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the PATH, or at its usual place."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else []
    found = [shutil.which(place) for place in (*places, "nvcc", "/usr/local/cuda/bin/nvcc")]
    return next((path for path in found if path), None)


def find_disassembler() -> str | None:
    """cuobjdump of the PATH or of Triton, which brings its own."""
    try:
        import triton
    except ImportError:
        bundled = None
    else:
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.is_file() else None)


def missing_tools() -> str:
    """Why the gate cannot run here; empty: it can."""
    if find_nvcc() is None:
        return "nvcc is not installed"
    if find_disassembler() is None:
        return "neither cuobjdump nor Triton, which brings one, is installed"
    return ""


def problems(found: Kernel, budget: CudaBudget | None) -> list[str]:
    """Everything that is wrong with a kernel."""
    wrong = []
    if found.spilled or found.local:
        wrong.append(f"spills: {found.spilled} bytes per thread, {found.local} local accesses")
    if budget is None:
        return [*wrong, "no entry in benchmarks/aot_cuda_budgets.py"]
    if found.registers > budget.registers:
        wrong.append(f"{found.registers} registers, budget {budget.registers}")
    for what, looped, everywhere, least, most in (
        ("loads", found.looped_loads, found.loads, budget.wide_loads, budget.narrow_loads),
        ("stores", found.looped_stores, found.stores, budget.wide_stores, budget.narrow_stores),
    ):
        wide = sum(count for bits, count in looped.items() if bits >= 128)
        narrow = sum(count for bits, count in everywhere.items() if bits < 128)
        if wide < least:
            wrong.append(f"{wide} 128-bit {what} in loops, at least {least} wanted")
        if narrow > most:
            wrong.append(f"{narrow} narrow {what}, at most {most} declared")
    return wrong


def compile_source(source: Path, target: str, extra: Sequence[str] = ()) -> list[Kernel] | str:
    """The kernels of a source, or why nvcc does not take it; what was read is kept in `CACHE`."""
    nvcc, disassembler = find_nvcc(), find_disassembler()
    assert nvcc is not None and disassembler is not None, "callers skip without tools"
    flags = [*FLAGS, *STRICT, *extra]
    kept = CACHE / f"cuda-{_key(source, [target, *flags])}.json"
    if kept.is_file():
        return [_kernel(row) for row in json.loads(kept.read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        includes = [f"-I{CSRC}", *(f"-isystem={path}" for path in _torch_includes())]
        run = subprocess.run(
            [nvcc, *flags, *includes, f"-arch={target}", "-cubin", str(source), "-o", str(cubin)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode != 0:
            lines = (run.stderr or run.stdout).splitlines()
            return next((line for line in lines if "error" in line or "warning" in line), "nvcc failed")
        dump = subprocess.run([disassembler, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    kernels = read(run.stderr, dump.stdout, target)
    CACHE.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps([asdict(kernel) for kernel in kernels]), encoding="utf-8")
    return kernels


def read(ptxas: str, sass: str, target: str) -> list[Kernel]:
    """Kernels from what ptxas -v says and from their disassembly."""
    kernels: dict[str, Kernel] = {}
    entry, functions = "", False
    for line in ptxas.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry, functions = match[1], False
            kernels[entry] = Kernel(readable(entry), target)
        elif match := re.search(r"Function properties for (\S+)", line):
            # Functions that were not inlined follow the entry that calls them.
            functions = match[1] != entry
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            kernels[entry].spilled += sum(map(int, match.groups()))
        elif (match := re.search(r"Used (\d+) registers", line)) and not functions:
            kernels[entry].registers = int(match[1])
            memory = re.search(r"(\d+) bytes smem", line)
            kernels[entry].shared = int(memory[1]) if memory else 0
    for entry, instructions in _functions(sass):
        if entry in kernels:
            _count(kernels[entry], instructions)
    return list(kernels.values())


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


def _functions(sass: str) -> Iterator[tuple[str, list[tuple[int, str, str]]]]:
    """(mangled name, [(address, mnemonic, operands)]) of every function of a disassembly."""
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        name = part.split(None, 1)[0]
        yield name, [(int(at, 16), code, operands) for at, code, operands in _INSTRUCTION.findall(part)]


def _count(kernel: Kernel, instructions: list[tuple[int, str, str]]) -> None:
    loops = []
    for at, mnemonic, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        # The endless branch to itself after the end is no loop.
        if mnemonic.startswith("BRA") and target is not None and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    for at, mnemonic, _ in instructions:
        code = mnemonic.partition(".")[0]
        if code in ("LDL", "STL"):
            kernel.local += 1
        totals = {"LDG": kernel.loads, "STG": kernel.stores}.get(code)
        looped = {"LDG": kernel.looped_loads, "STG": kernel.looped_stores}.get(code)
        if totals is None or looped is None:
            continue
        bits = width_of(mnemonic)
        totals[bits] = totals.get(bits, 0) + 1
        if any(begin <= at <= end for begin, end in loops):
            looped[bits] = looped.get(bits, 0) + 1


def readable(mangled: str) -> str:
    """gather_fwd_kernel<Bf16, 8> of its mangled name."""
    for match in re.finditer(r"\d+", mangled):
        name = mangled[match.end() : match.end() + int(match[0])]
        if "kernel" in name and re.fullmatch(r"[a-z_0-9]+", name):
            rest = mangled[match.end() + int(match[0]) :]
            break
    else:
        return mangled
    if not rest.startswith("I"):
        return name
    arguments = re.match(r"I(f|NS\w*?_?\d+(?:Fp16|Bf16)E)(?:Li(\d+)E)?", rest)
    if arguments is None:
        return name
    element = "float" if arguments[1] == "f" else arguments[1][-5:-1]
    return f"{name}<{element}, {arguments[2]}>" if arguments[2] else f"{name}<{element}>"


def gate(
    sources: Iterable[str], targets: Iterable[str], extra: Sequence[str] = (), processes: int = 2
) -> tuple[list[dict[str, Any]], list[str]]:
    """(one row per kernel and target, everything that is wrong)."""
    wanted = [(source, target) for source in sources for target in targets]
    with ThreadPoolExecutor(processes) as pool:
        paths = [(CSRC / f"{source}.cu", target, extra) for source, target in wanted]
        results = list(pool.map(lambda each: compile_source(*each), paths))
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for (source, target), found in zip(wanted, results, strict=True):
        if isinstance(found, str):
            wrong.append(f"{target} csrc/{source}.cu: does not compile: {found}")
            continue
        if not found:
            wrong.append(f"{target} csrc/{source}.cu: has no kernel")
        for kernel in found:
            faults = problems(kernel, BUDGETS.get(kernel.name))
            rows.append({"source": source, **asdict(kernel), "problems": faults})
            wrong += [f"{target} {kernel.name}: {fault}" for fault in faults]
    return rows, wrong


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a line per kernel and target."""
    yield "| kernel | target | registers | spilled | shared B | loads, bits | stores, bits |"
    yield "|---|---|---:|---:|---:|---|---|"
    for row in sorted(rows, key=lambda row: (row["name"], row["target"])):
        cells = [row["name"], row["target"], row["registers"], row["spilled"], row["shared"]]
        yield f"| {' | '.join(map(str, cells))} | {_widths(row['loads'])} | {_widths(row['stores'])} |"


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{count} x {bits}" for bits, count in sorted(counts.items(), reverse=True))


def _kernel(row: dict[str, Any]) -> Kernel:
    """JSON makes words of the widths."""
    for name in ("loads", "stores", "looped_loads", "looped_stores"):
        row[name] = {int(bits): count for bits, count in row[name].items()}
    return Kernel(**row)


def _key(source: Path, options: list[str]) -> str:
    """Hash of all that decides what is read: sources, options, tools, this reader."""
    files = [source, *sorted(CSRC.glob("*.cuh")), *sorted(CSRC.glob("*.hpp")), Path(__file__)]
    digest = hashlib.sha256("\0".join([*options, _tools()]).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


@cache
def _tools() -> str:
    tools = [tool for tool in (find_nvcc(), find_disassembler()) if tool is not None]
    versions = [
        subprocess.run([tool, "--version"], capture_output=True, text=True, check=True) for tool in tools
    ]
    import torch

    return torch.__version__ + "".join(version.stdout for version in versions)


@cache
def _torch_includes() -> tuple[Path, ...]:
    import torch

    return (Path(torch.__file__).parent / "include",)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot_cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--lineinfo", action="store_true", help="compile as the debug build does")
    parser.add_argument("--processes", type=int, default=2, help="that compile (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")
    args = parser.parse_args(arguments)
    if missing := missing_tools():
        parser.error(missing)
    rows, wrong = gate(args.sources, args.targets, ["-lineinfo"] if args.lineinfo else [], args.processes)
    print("\n".join(table(rows)))
    if args.json is not None:
        args.json.write_text(
            json.dumps({"kernels": rows, "problems": wrong}, indent=1) + "\n", encoding="utf-8"
        )
    print(f"\n{len({row['name'] for row in rows})} CUDA kernels, {len(rows)} builds, {len(wrong)} problems")
    for text in wrong:
        print(f"FAILED {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
