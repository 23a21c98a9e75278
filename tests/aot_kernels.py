"""What tests/test_aot.py has done in a process without Triton's interpreter: kernels are compiled, never run.

Among them kernels with known faults: each gate of benchmarks/aot.py must catch its own.
"""

import contextlib
import importlib
import io
import pkgutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

import d2vkern.kernels
from benchmarks import aot, aot_record
from benchmarks.aot_budgets import BUDGETS
from benchmarks.aot_build import TARGETS, Build, build_of, compile_all
from benchmarks.aot_gate import Budget, problems
from benchmarks.aot_read import Resources
from benchmarks.aot_record import arguments, vector_bytes
from d2vkern.kernels import _launch, _tuning
from d2vkern.kernels._launch import Launch


@triton.jit
def _row(source_ptr, start, at, inside):
    return tl.load(source_ptr + start + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sound_kernel(x_ptr, y_ptr, ids_ptr, table_ptr, out_ptr, width, rows, scale, BLOCK: tl.constexpr):
    """out[r] = scale * x[ids[r]] + y[ids[r]] + what the table points to, row after row."""
    at = tl.arange(0, BLOCK)
    inside = at < width
    other_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    other_ptr = tl.multiple_of(other_ptr, 16)
    out_row_ptr = out_ptr + tl.program_id(0).to(tl.int64) * rows * width
    for r in range(rows):
        start = tl.load(ids_ptr + tl.program_id(0) * rows + r).to(tl.int64) * width
        value = _row(x_ptr, start, at, inside) * scale + _row(y_ptr, start, at, inside)
        value += tl.load(other_ptr + at, mask=inside, other=0.0)
        tl.store(out_row_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)
        out_row_ptr += width


@triton.jit
def narrow_kernel(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Neighbours change places, which hides from Triton that a thread's elements lie side by side."""
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (at ^ 1))
    tl.store(out_ptr + at, x)


@triton.jit
def spilling_kernel(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """All of a thread's many values are needed twice."""
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32)
    total = tl.sum(x, 0)
    tl.store(out_ptr + at, x / total)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """c = a @ b over `width`; its stages fill shared memory."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * width + k[None, :]
    b_ptrs = b_ptr + k[:, None] * BLOCK_N + n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, width, BLOCK_K):
        total = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * BLOCK_N
    tl.store(c_ptr + m[:, None] * BLOCK_N + n[None, :], total.to(c_ptr.dtype.element_ty))


def launches() -> dict[str, Launch]:
    """One launch per fault, on meta tensors."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def launch(kernel: Any, *args: Any, warps: int = 4, stages: int = 2, **constexprs: int) -> Launch:
        return Launch(kernel, (7,), args, constexprs, warps, stages, True)

    x, ids, table = tensor(4096, 768), tensor(4096, dtype=torch.int32), tensor(16, dtype=torch.int64)
    wide = tensor(1 << 16, dtype=torch.float32)
    tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}
    return {
        "sound": launch(sound_kernel, x, x, ids, table, x, 768, 10, 0.5, BLOCK=1024),
        "odd rows": launch(sound_kernel, *[tensor(99, 97)] * 2, ids, table, x, 97, 10, 0.5, BLOCK=128),
        "narrow": launch(narrow_kernel, x, x, 1024, BLOCK=1024),
        "spilling": launch(spilling_kernel, wide, wide, 1 << 16, BLOCK=1 << 16),
        "overfull": launch(product_kernel, x, x, x, 1024, warps=8, stages=4, **tile),
        "product": launch(product_kernel, x, x, x, 1024, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "thin product": launch(product_kernel, x, x, x, 1024, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64),
        "broken": launch(narrow_kernel, x, x, 1024, BLOCK=1000),
    }


def faults() -> dict[str, Any]:
    """All compiled for sm_90: per launch resources, narrow accesses, problems under two budgets."""
    budgets = {"loose": Budget(registers=255), "tight": Budget(registers=16, products="HGMMA")}
    found = {}
    all_launches = launches()
    built = {name: build_of(launch, "sm_90") for name, launch in all_launches.items()}
    results = compile_all(built.values(), processes=1)
    for name, launch in all_launches.items():
        result = results[built[name]]
        vectors = {
            key: vector_bytes(value)
            for key, value in arguments(launch).items()
            if isinstance(value, torch.Tensor)
        }
        row: dict[str, Any] = {
            key: problems(result, "sm_90", budget, vectors) for key, budget in budgets.items()
        }
        row["undeclared"] = problems(result, "sm_90", None, vectors)
        row["resources"] = asdict(result) if isinstance(result, Resources) else {"error": result}
        row["source"], row["signature"] = built[name].source, dict(built[name].signature)
        found[name] = row
    return found


def gate(*options: str, out: Path | None = None) -> tuple[int, str]:
    """Exit code and output of the command, which compiles in this process and leaves csrc/ out."""
    json = [] if out is None else ["--json", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = aot.main([*options, "--no-nvcc", "--processes", "1", *json])
    return code, printed.getvalue()


def by_turns(builds: Iterable[Build]) -> list[Build]:
    """Of each kernel's sample: all of sm_90 and one precision elsewhere where it has products, which is where
    targets differ; else one precision of sm_90, and the others, or the same, on one target each in turn."""
    sampled: dict[str, dict[str, dict[str, Build]]] = {}
    for build in aot_sample(builds):
        kinds = sampled.setdefault(build.kernel, {})
        kinds.setdefault("/".join(kind for _, kind in build.signature), {})[build.target] = build
    others = [target for target in TARGETS if target != "sm_90"]
    chosen = []
    for turn, (kernel, kinds) in enumerate(sampled.items()):
        first, *further = kinds.values()
        if BUDGETS[kernel].products:
            chosen += [*first.values(), *(kind["sm_90"] for kind in further)]
        else:
            chosen.append(first["sm_90"])
            chosen += [kind[others[(turn + i) % len(others)]] for i, kind in enumerate(further or [first])]
    return chosen


aot_sample = aot.sample


def gate_by_turns(out: Path) -> tuple[int, str]:
    """The gate over base presets in both precisions, of every kernel what `by_turns` chooses."""
    with mock.patch.object(aot, "sample", by_turns):
        return gate("--sample", "--presets", "image_base", "audio_base", "text_base", out=out)


def gate_of_an_answer(answer: Resources | str, *options: str) -> tuple[int, str]:
    """The gate over what a compiler that always answers the same gives."""
    with mock.patch.object(aot, "compile_all", lambda builds, processes: dict.fromkeys(builds, answer)):
        narrow = ["--ops", "ema", "--presets", "image_tiny", "--targets", "sm_90", "--sample"]
        return gate(*narrow, *options)


def targets_of_tuned(gpu: str) -> tuple[list[str], int]:
    """For which targets what was measured on that GPU is compiled, and for how many what was not."""
    stem, case = next(aot_record.cases_of(["ema"], ["image_tiny"], ["bf16"]))
    with mock.patch.object(_tuning, "read_table", lambda: {gpu: {}}):
        tuned = aot_record.record_tuned(stem, case)
    users = aot.users_of({"preset": aot_record.record(stem, case)}, list(TARGETS))
    return [build.target for build in aot.users_of({"candidate": tuned}, list(TARGETS))], len(users)


def kernels() -> dict[str, Any]:
    """All of ours that have budgets."""
    found = {}
    for module in pkgutil.iter_modules(d2vkern.kernels.__path__, "d2vkern.kernels."):
        for name, kernel in vars(importlib.import_module(module.name)).items():
            if name in BUDGETS and hasattr(kernel, "cache_key"):
                found[name] = kernel
    return found


def multiplying() -> tuple[set[str], set[str]]:
    """Names of our kernels, and of those that `launch` takes to have products."""
    found = kernels()
    return set(found), {name for name in found if _launch.multiplies(found[name])}


def stages(name: str, capability: tuple[int, int]) -> int:
    """Of three, how many the kernel gets beside a Triton whose pipelines lack a fence."""
    with mock.patch.object(_launch, "_hazard", lambda: "a hazard"):
        return _launch.most_stages(kernels()[name], 3, capability)
