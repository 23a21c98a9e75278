"""The ahead-of-time gate: it reads compilers' output right, catches every fault, and our kernels pass it.

Triton's interpreter is on in the process of the tests, so what compiles kernels runs in another.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import aot  # noqa: E402
from benchmarks.aot_budgets import BUDGETS, TOUCHED  # noqa: E402
from benchmarks.aot_gate import (  # noqa: E402
    Budget,
    Narrow,
    narrow_accesses,
    problems,
    programs_per_multiprocessor,
)
from benchmarks.aot_read import (  # noqa: E402
    Resources,
    Traffic,
    accesses,
    amd_resources,
    ptx_places,
    unfenced_loops,
    width_of,
)
from benchmarks.aot_record import kernels_of, triton_stems, vector_bytes  # noqa: E402
from benchmarks.aot_roofline import eager_counts  # noqa: E402
from benchmarks.aot_trace import OpTrace  # noqa: E402
from d2vkern._backend import REGISTRY  # noqa: E402
from d2vkern.kernels._launch import pipeline_hazard  # noqa: E402
from d2vkern.testing import allocations  # noqa: E402

HGMMA = "matrix instructions: HGMMA, expected none"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def compiling() -> Iterator[Callable[..., Any]]:
    """Calls a function of aot_kernels.py in a process without the interpreter."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            patch.setenv("OMP_NUM_THREADS", "1")
            assert pool.submit(os.getpid).result() != os.getpid()
        yield lambda name, *args, **options: pool.submit(_call, name, args, options).result()


def _call(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    from . import aot_kernels

    return getattr(aot_kernels, name)(*args, **options)


@pytest.fixture(scope="module")
def faults(compiling: Callable[..., Any]) -> dict[str, Any]:
    """What the gate says of the kernels in aot_kernels.py."""
    return compiling("faults")


@pytest.fixture(scope="module")
def report(compiling: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kernel of ours as `by_turns` says."""
    out = tmp_path_factory.mktemp("aot") / "report.json"
    code, printed = compiling("gate_by_turns", out)
    return json.loads(out.read_text()) | {"code": code, "printed": printed}


@pytest.mark.slow
def test_our_kernels_pass(report: dict[str, Any]) -> None:
    assert report["problems"] == [] and report["code"] == 0, report["printed"][-3000:]


@pytest.mark.slow
def test_every_kernel_of_every_op_is_compiled(report: dict[str, Any]) -> None:
    """For sm_90 and one target more, and for every target and in every precision where it has products."""
    targets: dict[str, set[str]] = {}
    for row in report["builds"]:
        assert row["spilled"] == 0 and row["users"] and row["registers"] > 0, row["build"]
        targets.setdefault(row["kernel"], set()).add(row["target"])
    wanted = kernels_of(triton_stems())
    assert len(wanted) >= len(triton_stems()) and targets.keys() == wanted
    assert all("sm_90" in some and len(some) > 1 for some in targets.values())
    products = {name for name in wanted if BUDGETS[name].products}
    assert {name for name, some in targets.items() if some == set(TARGETS)} >= products
    assert set.union(*(some for name, some in targets.items() if name not in products)) == set(TARGETS)
    kinds = {row["pointers"] for row in report["builds"] if row["kernel"] in products}
    assert {"bf16", "fp32", "bf16/fp32"} <= kinds


def test_every_budget_belongs_to_a_kernel() -> None:
    known = kernels_of([stem for stem in REGISTRY if "triton" in REGISTRY[stem]])
    assert BUDGETS.keys() == known
    assert TOUCHED.keys() <= known
    assert all(len(leave.why) > 20 for budget in BUDGETS.values() for leave in budget.narrow.values())


def test_roofline_on_paper(compiling: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "paper.json"
    narrow = ["--presets", "text_tiny", "--targets", "sm_90", "--dtypes", "bf16"]
    code, printed = compiling("gate", "--ops", "ema", "masks", *narrow, out=out)
    assert code == 0, printed[-2000:]
    papers = {(row["op"], row["case"]): row for row in json.loads(out.read_text())["papers"]}
    plain, copies = papers["ema_update_", "fp32"], papers["ema_update_", "fp32 and bfloat16 copies"]
    values = plain["floor"] // 12
    assert plain["floor"] == 12 * values and copies["floor"] == 14 * values
    for row in (plain, copies):
        # the table of pointers comes on top
        assert row["floor"] < row["moved"] < 1.01 * row["floor"] and row["kernels"] == 1
        assert row["floor_us"] == pytest.approx(row["floor"] / 4.3e6)
    # eager reads the teacher once more to copy it
    assert plain["eager_moved"] == pytest.approx(12 * values, rel=1e-6)
    assert copies["eager_moved"] == pytest.approx(18 * values, rel=1e-6)
    masks = papers["random_mask", "masks"]
    assert masks["moved"] == masks["floor"] == 16 * 8 + 64 * (5 * 512 + 4 * 266)
    assert masks["eager_moved"] > 10 * masks["floor"] and masks["eager_operators"] > 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sound", []),
        ("odd rows", []),
        ("narrow", ["load x_ptr: 16-bit accesses where 128-bit ones are possible"]),
        (
            "overfull",
            ["shared memory 394240 above 232448 bytes", "matrix instructions: HGMMA, expected none"],
        ),
        ("product", ["matrix instructions: HGMMA, expected none"]),
        ("thin product", ["matrix instructions: HMMA, expected none"]),
        ("broken", ["does not compile: CompilationError: arange's range must be a power of 2"]),
    ],
)
def test_each_fault_is_found(faults: dict[str, Any], name: str, expected: list[str]) -> None:
    assert faults[name]["loose"] == expected


def test_spills_budgets_and_missing_entries_are_found(faults: dict[str, Any]) -> None:
    (spill,) = faults["spilling"]["loose"]
    assert spill.startswith("spills ") and faults["spilling"]["resources"]["spilled"] > 1000
    registers = faults["sound"]["resources"]["registers"]
    assert faults["sound"]["tight"] == [
        f"{registers} registers, budget 16",
        "matrix instructions: none, expected HGMMA",
    ]
    assert faults["thin product"]["tight"][-1] == "matrix instructions: HMMA, expected HGMMA"
    assert faults["sound"]["undeclared"] == ["no entry in benchmarks/aot_budgets.py"]


def test_accesses_are_traced_through_helpers_loops_and_tables(faults: dict[str, Any]) -> None:
    traffic = faults["sound"]["resources"]["traffic"]
    assert traffic == {
        "load table_ptr": {"item": 8, "blocks": [], "scalars": 1},
        "load ids_ptr": {"item": 4, "blocks": [], "scalars": 1},
        "load *table_ptr": {"item": 4, "blocks": [(128, 32.0, 2)], "scalars": 0},
        "load x_ptr": {"item": 2, "blocks": [(128, 16.0, 1)], "scalars": 0},
        "load y_ptr": {"item": 2, "blocks": [(128, 16.0, 1)], "scalars": 0},
        "store out_ptr": {"item": 2, "blocks": [(128, 16.0, 1)], "scalars": 0},
    }
    product = faults["product"]["resources"]["traffic"]
    assert set(product) == {"load a_ptr", "load b_ptr", "store c_ptr"}


def test_arguments_are_specialised_as_in_a_launch(faults: dict[str, Any]) -> None:
    assert faults["sound"]["signature"] == {
        "x_ptr": "*bf16", "y_ptr": "*bf16", "ids_ptr": "*i32", "table_ptr": "*i64", "out_ptr": "*bf16",
        "width": "i32", "rows": "i32", "scale": "fp32", "BLOCK": "constexpr",
    }  # fmt: skip


def test_gate_by_hand() -> None:
    found = Resources(
        registers=40, warps=4, traffic={"load x_ptr": Traffic(2, [(128, 16.0, 4), (16, 8.0, 2)])}
    )
    assert narrow_accesses(found, {"x_ptr": 16}) == [("load x_ptr", 2, 8)]
    assert narrow_accesses(found, {"x_ptr": 4}) == [("load x_ptr", 2, 4)]
    assert narrow_accesses(found, {"x_ptr": 2}) == []
    leave = {"x_ptr": Narrow("the last elements of a row, fewer than fit", 128)}
    assert problems(found, "sm_90", Budget(registers=40, narrow=leave), {}) == []
    found.traffic["load x_ptr"].blocks[0] = (64, 16.0, 4)
    assert problems(found, "sm_90", Budget(registers=40, narrow=leave), {}) == [
        "load x_ptr: at most 64-bit accesses, declared 128-bit"
    ]
    full = Resources(registers=40, warps=4, shared=170 << 10)
    assert problems(full, "sm_90", Budget(registers=40), {}) == []
    assert problems(full, "sm_80", Budget(registers=40), {}) == ["shared memory 174080 above 166912 bytes"]
    assert problems(full, "gfx942", Budget(registers=1), {}) == ["shared memory 174080 above 65536 bytes"]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(32, 0, 4, 16), (33, 0, 4, 12), (128, 0, 4, 4), (255, 0, 8, 1), (16, 0, 1, 32), (32, 100 << 10, 4, 2)],
)
def test_occupancy(registers: int, shared: int, warps: int, expected: int) -> None:
    found = Resources(registers=registers, shared=shared, warps=warps)
    assert programs_per_multiprocessor(found, "sm_90") == expected


@pytest.mark.parametrize(
    ("mnemonic", "bits"),
    [("LDG.E", 32), ("LDG.E.128.CONSTANT", 128), ("STG.E.U8", 8), ("LDG.E.S16", 16),
     ("LDGSTS.E.BYPASS.128", 128), ("LDG.E.64.STRONG.GPU", 64), ("LDG.E.ENL2.256", 256)],
)  # fmt: skip
def test_widths_of_instructions(mnemonic: str, bits: int) -> None:
    assert width_of(mnemonic) == bits


def _sass(*lines: str) -> str:
    """A listing as nvdisasm writes it, of "1:" for a label, "BRA 1" for a branch there, and instructions."""
    out = []
    for i, line in enumerate(lines):
        code = re.sub(r"BRA (\d+)", r"BRA `(.L_x_\1)", line)
        out.append(f".L_x_{line}" if line.endswith(":") else f"        /*{16 * i:04x}*/  {code} ;")
    return "\n".join(out)


COPY, PRODUCT, FENCE = "LDGSTS.E.BYPASS.128 [R1], [R2]", "HGMMA.64x64x16.F32.BF16 R24", "FENCE.VIEW.ASYNC.S"
LOOPS = {
    "no fence": ((FENCE, COPY, "1:", "LDGDEPBAR", PRODUCT, COPY, "@!P0 BRA 1"), 1),
    "a fence": ((COPY, "1:", FENCE, PRODUCT, COPY, "BRA 1"), 0),
    "no copies": ((COPY, "1:", PRODUCT, "BRA 1"), 0),
    "products from registers": (("1:", COPY, "HMMA.16816.F32.BF16 R4", "BRA 1"), 0),
    "no loop": ((COPY, PRODUCT, "1:", "BRA 1"), 0),
    "forward": (("BRA 1", COPY, PRODUCT, "1:", "EXIT"), 0),
    "of sm_100": (("1:", COPY, "UTCHMMA gdesc[UR4]", "BRA 1"), 1),
    "one in two": (
        ("1:", COPY, "2:", FENCE, PRODUCT, COPY, "BRA 2", "3:", PRODUCT, COPY, "BRA 3", "BRA 1"),
        1,
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_pipelined_loops_hold_a_fence(name: str) -> None:
    lines, count = LOOPS[name]
    assert unfenced_loops(_sass(*lines)) == count
    wrong = problems(Resources(registers=1, warps=4, unfenced=count), "sm_90", Budget(registers=255), {})
    assert [text for text in wrong if "fence.proxy.async" in text] == (
        ["1 pipelined loops without fence.proxy.async between copy and product"] * count
    )


def test_what_multiplies_is_what_has_products_in_its_budget(compiling: Callable[..., Any]) -> None:
    """What `launch` starts without pipelining beside a Triton without the fence, and nothing else."""
    known, multiplying = compiling("multiplying")
    assert known == BUDGETS.keys()
    products = {name for name, budget in BUDGETS.items() if budget.products}
    assert multiplying == products | {"conv_stem_bwd_kernel_wave_squares"}  # whose product is in fp32
    for version in ("3.6.0", "3.6.0+git1234", "3.7.0"):
        assert pipeline_hazard(version), version
    for version in ("3.7.1", "3.8.0", "4.0", "4.0.0+git", "main"):
        assert not pipeline_hazard(version), version
    product, plain = "taps_tiles_kernel", "gather_fwd_kernel"
    for kernel, capability, most in ((product, (9, 0), 1), (product, (8, 0), 3), (plain, (9, 0), 3)):
        assert compiling("stages", kernel, capability) == most


def test_ptx_inside_assembly_comes_from_where_the_assembly_begins() -> None:
    ptx = """.file 1 "/somewhere" "x.py"
    .loc 1 10 3
    add;
    .loc 1 12 5, function_name $L, inlined_at 1 40 9
    // begin inline asm
    .loc 1 13 5
    ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    // end inline asm
    mov;"""
    places = ptx_places(ptx)
    inlined = (("x.py", 12, 5), ("x.py", 40, 9))
    assert places[3] == (("x.py", 10, 3),)
    assert places[7] == places[8] == places[9] == inlined


def test_pointers_chosen_by_a_branch_have_two_names() -> None:
    ttgir = """module attributes {"ttg.num-warps" = 2 : i32} {
  tt.func public @k(%a_ptr: !tt.ptr<f32> loc("a"), %b_ptr: !tt.ptr<f32> loc("b"), %c: i1 loc("c")) {
    %p = scf.if %c -> (!tt.ptr<f32>) {
      scf.yield %a_ptr : !tt.ptr<f32> loc(#loc1)
    } else {
      scf.yield %b_ptr : !tt.ptr<f32> loc(#loc1)
    } loc(#loc1)
    %q = tt.splat %p : !tt.ptr<f32> -> tensor<4x64x!tt.ptr<f32>, #blocked> loc(#loc1)
    %x = tt.load %q : tensor<4x64x!tt.ptr<f32>, #blocked> loc(#loc2)
    %s = arith.select %c, %a_ptr, %b_ptr : !tt.ptr<f32> loc(#loc1)
    %y = tt.load %s : !tt.ptr<f32> loc(#loc3)
  } loc(#loc)
} loc(#loc)
#loc1 = loc("/x.py":3:4)
#loc2 = loc("name"(#loc4))
#loc3 = loc(callsite(#loc1 at #loc4))
#loc4 = loc("/x.py":5:6)
"""
    block, single = accesses(ttgir)
    assert (block.pointer, block.lane, block.place) == ("a_ptr|b_ptr", 16.0, (("x.py", 5, 6),))
    assert (single.pointer, single.lane) == ("a_ptr|b_ptr", None)
    assert single.place == (("x.py", 3, 4), ("x.py", 5, 6))


def test_amd_metadata() -> None:
    text = """
    .group_segment_fixed_size: 2048
    .max_flat_workgroup_size: 256
    .private_segment_fixed_size: 8
    .vgpr_count:     14
    .vgpr_spill_count: 2
    .wavefront_size: 64"""
    assert amd_resources(text) == Resources(registers=14, spilled=10, shared=2048, warps=4)


def _rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (_rows(5, 768), 16),
        (_rows(5, 12), 8),
        (_rows(5, 13), 2),
        (_rows(5, 197, 768)[:, 1:], 16),
        (_rows(5, 13)[:1], 2),
        (_rows(768, 5).t(), 2),
        (_rows(4, 20)[:, 2:18], 4),
        (_rows(196, dtype=torch.int32), 16),
        (_rows(7, 196, dtype=torch.uint8), 4),
        (_rows(dtype=torch.float32), 4),
    ],
)
def test_what_a_layout_allows(tensor: Tensor, expected: int) -> None:
    assert vector_bytes(tensor) == expected


def test_trace_counts_what_operators_touch() -> None:
    x, out = torch.ones(8, 16), torch.empty(8, 16)
    index = torch.tensor([1, 2])
    with OpTrace("cpu") as trace:
        y = x.view(16, 8).t() + 1
        out.copy_(x)
        out.zero_()
        picked = x.index_select(0, index)
        out.index_add_(0, index, picked)
        torch.mm(x, y.reshape(16, 8), out=out.new_empty(8, 8))
        x.expand(3, 8, 16).sum()
    sizes = [(call.name, call.bytes, call.allocated) for call in trace.calls]
    assert sizes == [
        ("add", 1024, 512),
        ("copy_", 1024, 0),
        ("zero_", 512, 0),
        ("index_select", 2 * 128 + 16, 128),
        ("index_add_", 128 + 16 + 2 * 128, 0),
        ("clone", 1024, 512),
        ("mm", 512 + 512 + 256, 0),
        ("sum", 512 + 4, 4),
    ]
    assert trace.bytes == sum(size for _, size, _ in sizes)


def test_eager_is_counted_at_one_sample_and_scaled() -> None:
    counts = eager_counts("gather", "text_tiny", "student input", torch.float32)
    # x [16, 512, 64]: picked and written once each, with the row numbers, and the numbers themselves made
    rows, width = 64 * 266, 64 * 4
    assert 2 * rows * width < counts["forward"]["eager_moved"] < 2.5 * rows * width
    assert rows * width < counts["forward"]["eager_allocated"] < 1.5 * rows * width
    assert counts["backward"]["eager_operators"] > 1


def test_trace_and_allocator_agree() -> None:
    x = torch.randn(64, 256)

    def run() -> OpTrace:
        with OpTrace("cpu") as trace:
            torch.relu(x) * 2
        return trace

    trace, changes = allocations(run)
    assert trace.allocated == 2 * x.nbytes
    assert 2 * x.nbytes <= sum(change for change in changes if change > 0) < 2.01 * x.nbytes


def test_command_line_refuses_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--ops", "masks"])
    assert "TRITON_INTERPRET must be unset" in capsys.readouterr().err


def test_another_triton_is_asked_only_whether_it_compiles(compiling: Callable[..., Any]) -> None:
    """--compiles passes what spills, which fails otherwise, and fails what does not compile."""
    spills = Resources(registers=8, warps=8, spilled=8)
    for answer, options, expected, words in (
        (spills, ["--compiles"], 0, "0 problems"),
        (spills, [], 1, "spills 8 bytes"),
        ("CompilationError: no", ["--compiles"], 1, "does not compile: CompilationError: no"),
    ):
        code, printed = compiling("gate_of_an_answer", answer, *options)
        assert code == expected and words in printed, printed[-500:]


def test_what_was_measured_on_a_gpu_is_compiled_for_it_alone(compiling: Callable[..., Any]) -> None:
    for gpu, wanted in (
        ("NVIDIA H200", ["sm_90"]), ("NVIDIA A100-SXM4-80GB", ["sm_80"]), ("Some GPU", list(TARGETS)),
    ):  # fmt: skip
        assert compiling("targets_of_tuned", gpu) == (wanted, len(TARGETS)), gpu
