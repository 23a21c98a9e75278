"""The ahead-of-time gate for csrc/*.cu: our kernels pass it, kernels with known faults do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import aot_cuda
from benchmarks.aot_cuda import (
    CSRC,
    FLAGS,
    SOURCES,
    TARGETS,
    Kernel,
    compile_source,
    gate,
    problems,
    read,
    readable,
)
from benchmarks.aot_cuda_budgets import BUDGETS, CudaBudget

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tools() -> None:
    if missing := aot_cuda.missing_tools():
        pytest.skip(missing)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_our_kernels_pass(tools: None, target: str) -> None:
    rows, wrong = gate(SOURCES, [target])
    assert wrong == []
    assert {row["name"] for row in rows} == BUDGETS.keys()
    assert all(row["registers"] > 8 and row["target"] == target for row in rows)


def test_every_source_is_in_the_gate() -> None:
    launching = {path.stem for path in CSRC.glob("*.cu") if "start(" in path.read_text(encoding="utf-8")}
    assert launching == set(SOURCES)


def test_wide_kernels_declare_wide_accesses() -> None:
    """Every kernel has 128-bit accesses in its loops, except those made for what is not aligned."""
    without = {name for name, budget in BUDGETS.items() if not (budget.wide_loads or budget.wide_stores)}
    assert without == {name for name in BUDGETS if name.endswith(", 1>")}


def test_flags_are_those_of_the_build() -> None:
    build = ROOT / "csrc" / "build.py"
    if not build.is_file():
        pytest.skip("csrc/build.py does not exist yet")
    text = build.read_text(encoding="utf-8")
    assert [flag for flag in FLAGS if flag not in text] == []
    assert "-lineinfo" in text


@pytest.fixture(scope="session")
def faults(tools: None) -> dict[str, Kernel]:
    found = compile_source(ROOT / "tests" / "cuda_faults.cu", "sm_90a")
    assert not isinstance(found, str), found
    return {kernel.name: kernel for kernel in found}


WIDE = CudaBudget(registers=40, wide_loads=1, wide_stores=1, narrow_loads=0, narrow_stores=0)
FAULTS = {
    "sound_kernel": [],
    "narrow_kernel": [
        r"0 128-bit loads in loops, at least 1 wanted", r"\d+ narrow loads, at most 0 declared",
        r"0 128-bit stores in loops, at least 1 wanted", r"\d+ narrow stores, at most 0 declared",
    ],
    "narrow_loop_kernel": [
        r"0 128-bit loads in loops, at least 1 wanted", r"\d+ narrow loads, at most 0 declared",
        r"0 128-bit stores in loops, at least 1 wanted", r"\d+ narrow stores, at most 0 declared",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_narrow_accesses_are_caught(faults: dict[str, Kernel], name: str) -> None:
    found = problems(faults[name], WIDE)
    assert len(found) == len(FAULTS[name]), found
    assert all(re.fullmatch(wanted, text) for wanted, text in zip(FAULTS[name], found, strict=True)), found


@pytest.mark.parametrize("name", ["stack_kernel", "spilling_kernel"])
def test_local_memory_is_caught(faults: dict[str, Kernel], name: str) -> None:
    kernel = faults[name]
    (found,) = problems(kernel, CudaBudget(registers=255))
    assert re.fullmatch(r"spills: \d+ bytes per thread, \d+ local accesses", found)
    assert kernel.spilled > 0 and kernel.local > 0


def test_registers_and_missing_budgets_are_caught(faults: dict[str, Kernel]) -> None:
    sound = faults["sound_kernel"]
    tight = CudaBudget(registers=sound.registers - 1)
    assert problems(sound, tight) == [f"{sound.registers} registers, budget {sound.registers - 1}"]
    assert problems(sound, CudaBudget(registers=sound.registers)) == []
    assert problems(sound, None) == ["no entry in benchmarks/aot_cuda_budgets.py"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("__global__ void broken_kernel(float* x) { x[0] = y; }", "identifier"),
        ("__global__ void careless_kernel(float* x) { int unused = 0; x[0] = 1; }", "unused"),
    ],
)
def test_sources_that_do_not_compile_or_warn_are_caught(
    tools: None, tmp_path: Path, text: str, why: str
) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(text + "\n")
    found = compile_source(source, "sm_90a")
    assert isinstance(found, str) and why in found


def test_line_information_changes_no_code(tools: None) -> None:
    plain, debug = (compile_source(CSRC / "ema.cu", "sm_90a", extra) for extra in ((), ("-lineinfo",)))
    assert not isinstance(plain, str) and plain == debug


def test_what_was_read_is_kept_and_follows_the_content(
    tools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot_cuda, "CACHE", tmp_path / "kept")
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void one_kernel(float* x) { x[threadIdx.x] = 1.0f; }\n")
    first = compile_source(source, "sm_80")
    assert compile_source(source, "sm_80") == first and len(list((tmp_path / "kept").iterdir())) == 1
    source.write_text("__global__ void two_kernel(float* x) { x[threadIdx.x] = 2.0f; }\n")
    second = compile_source(source, "sm_80")
    assert not isinstance(first, str) and not isinstance(second, str)
    assert (first[0].name, second[0].name) == ("one_kernel", "two_kernel")


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN3d2v17gather_fwd_kernelIfLi4EEEvNS_15GatherArgumentsIT_EE", "gather_fwd_kernel<float, 4>"),
        ("_ZN3d2v22gather_bwd_kernel_rowsINS_4Bf16ELi8EEEvNS_15GatherGradientsIT_EE",
         "gather_bwd_kernel_rows<Bf16, 8>"),
        ("_ZN3d2v14ema_fwd_kernelEPKliNS_5KindsENS_12DeviceScalarEf", "ema_fwd_kernel"),
        ("_Z12sound_kernelPK6float4PS_l", "sound_kernel"),
        ("_Z5otherPf", "_Z5otherPf"),
    ],
)  # fmt: skip
def test_names(mangled: str, name: str) -> None:
    assert readable(mangled) == name


def test_reader_by_hand() -> None:
    ptxas = """ptxas info    : Compiling entry function '_Z10one_kernelPf' for 'sm_90a'
ptxas info    : Function properties for _Z10one_kernelPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes stack, 128 bytes smem
ptxas info    : Function properties for helper
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    sass = """
		Function : _Z10one_kernelPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x1 */
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   STG.E.U16 desc[UR4][R2.64+0x20], R4 ;
        /*0060*/                   STL [R1], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
"""
    (kernel,) = read(ptxas, sass, "sm_90a")
    assert kernel == Kernel(
        "one_kernel", "sm_90a", registers=40, spilled=8 + 4 + 12 + 16, local=1, shared=128,
        loads={32: 1, 128: 1}, stores={128: 1, 16: 1}, looped_loads={128: 1}, looped_stores={128: 1},
    )  # fmt: skip
