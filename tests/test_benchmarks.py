"""The benchmark instrument: it gates, it times, it notices slower and wrong results."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.cases import Case, Settings, Unavailable
from benchmarks.gate import Gate, assert_as_close
from benchmarks.harness import Variant, measure_case, time_variants
from benchmarks.report import SCHEMA, add_ceilings, compare
from d2vkern._backend import REGISTRY, STEMS, Implementation, gaps

CPU = Settings(
    device=torch.device("cpu"), rounds=2, turn_seconds=0.0, budget_seconds=0.1, most_sets=1, compile=False
)
COLUMNS = {
    "us",
    "iqr_us",
    "rounds",
    "calls_per_round",
    "timing",
    "sets",
    "GB/s",
    "GFLOP/s",
    "share",
    "peak_MiB",
}


def _case(stem: str, preset: str, index: int = 0) -> Case:
    bench = importlib.import_module(f"benchmarks.bench_{stem}")
    return bench.cases(preset, "smoke", torch.float32)[index]


@pytest.fixture(scope="module", autouse=True)
def no_interpreter() -> Iterator[None]:
    """Triton's interpreter is tested elsewhere; timing it would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One smoke run of two ops through the command line, as its JSON."""
    out = tmp_path_factory.mktemp("bench") / "results.json"
    tiny = ["--smoke", "--device", "cpu", "--presets", "text_tiny"]
    assert run.main([*tiny, "--ops", "mlp", "masks", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_json_has_provenance_and_every_column(results: dict[str, Any]) -> None:
    assert results["schema"] == SCHEMA
    assert {"cpu", "gpu", "driver", "torch", "triton", "commit", "date", "threads"} <= results[
        "provenance"
    ].keys()
    assert results["rates"]["copy_GB/s"] > 0 and results["rates"]["fp32_GFLOP/s"] > 0
    rows = results["rows"]
    assert {(row["stem"], row["direction"]) for row in rows} == {
        ("mlp", "forward"),
        ("mlp", "forward+backward"),
        ("masks", "forward"),
    }
    compiled = [] if gaps("masks", "native") else [("masks", "native")]
    compiled += [] if gaps("mlp", "onednn") else [("mlp", "onednn")]
    for row in rows:
        runs = row["variant"] in ("eager", "pytorch") or (row["stem"], row["variant"]) in compiled
        assert row["status"] == ("ok" if runs else "skipped"), row
        if row["status"] == "ok":
            assert row.keys() >= COLUMNS
            assert row["us"] > 0 and row["peak_MiB"] > 0 and 0 < row["share"] == row["floor_us"] / row["us"]
    eager = [row for row in rows if row["variant"] == "eager"]
    assert all(row["against_eager"] == 1.0 and row["ours"] for row in eager)


def test_cost_and_floor_are_the_formulas() -> None:
    case = _case("mlp", "text_tiny")
    inputs = case.make(torch.device("cpu"))
    rows, width = inputs["x"].shape
    assert case.forward.flops == 2 * 2 * rows * width * 4 * width
    row = {name: "x" for name in ("stem", "op", "case", "preset", "shape", "direction")}
    row |= {"variant": "eager", "dtype": "float32", "status": "ok", "us": 8.0, "bytes": 4000, "flops": 3000}
    add_ceilings([row], copy=1e9, matmul={"float32": 1e9})
    assert (row["floor_us"], row["bound"], row["share"], row["GB/s"]) == (4.0, "copy", 0.5, 0.5)


@pytest.mark.parametrize("stem", STEMS)
def test_every_op_declares_cases_at_every_modality_and_none_twice(stem: str) -> None:
    bench = importlib.import_module(f"benchmarks.bench_{stem}")
    names = []
    for preset in run.BASE:
        for size in ("cpu", "gpu"):
            names += [
                (c.preset, c.op, c.name, c.shape, size) for c in bench.cases(preset, size, torch.bfloat16)
            ]
    assert len(names) == len(set(names))
    assert {name[0] for name in names} == ({"audio_base"} if stem == "conv_stem" else set(run.BASE))


@pytest.mark.parametrize(
    ("stem", "preset", "index"),
    [("attention", "audio_tiny", 0), ("gather", "image_tiny", 0), ("gather", "audio_tiny", 1),
     ("conv_block", "text_tiny", 1), ("residual_norm", "image_tiny", 0), ("targets", "image_tiny", 0),
     ("loss", "text_tiny", 0), ("ema", "text_tiny", 0), ("adamw_ema", "text_tiny", 0)],
)  # fmt: skip
def test_eager_and_plain_pass_the_gate(stem: str, preset: str, index: int) -> None:
    case = _case(stem, preset, index)
    gate = Gate(case, CPU)
    gate.check(lambda inputs: case.call(inputs, "eager"))
    gate.check(case.plain)
    assert len(gate.exact) > len(case.leaves)


def test_gate_refuses_wrong_results_and_wrong_gradients() -> None:
    case = _case("mlp", "text_tiny")

    def slightly_off(inputs: dict[str, Any]) -> torch.Tensor:
        return case.plain(inputs) * (1 + 1e-4)

    def wrong_gradient(inputs: dict[str, Any]) -> torch.Tensor:
        return case.plain(inputs | {"w1": inputs["w1"].detach() + 0 * inputs["w1"]})

    def crashing(inputs: dict[str, Any]) -> torch.Tensor:
        raise RuntimeError("out of registers")

    def absent(inputs: dict[str, Any]) -> torch.Tensor:
        raise Unavailable("not installed")

    found = [Variant(f.__name__, True, f) for f in (slightly_off, wrong_gradient, crashing, absent)]
    found.append(Variant("peer", False, crashing, optional=True))
    rows = {
        row["variant"]: row for row in measure_case("mlp", case, CPU, found) if row["direction"] == "forward"
    }
    assert {name: row["status"] for name, row in rows.items()} == {
        "slightly_off": "failed", "wrong_gradient": "failed", "crashing": "failed", "absent": "skipped",
        "peer": "skipped"}  # fmt: skip
    assert "gate: out: largest error" in rows["slightly_off"]["reason"]
    assert "gate: grad w1:" in rows["wrong_gradient"]["reason"]
    assert "out of registers" in rows["crashing"]["reason"]
    assert all("us" not in row for row in rows.values())


def test_gate_is_bitwise_where_the_case_says_so() -> None:
    case = _case("gather", "image_tiny")

    def last_bit(inputs: dict[str, Any]) -> torch.Tensor:
        out = case.call(inputs, "eager")
        return out.detach().nextafter(torch.full((), 9.0)) + (out - out.detach())

    (row, _) = measure_case("gather", case, CPU, [Variant("last bit", True, last_bit)])
    assert row["status"] == "failed" and "values differ, first at" in row["reason"]


def test_error_gate_sees_nan_dtype_and_a_bias_below_the_largest_error() -> None:
    exact = torch.linspace(1, 2, 4096, dtype=torch.float64)
    plain = exact.float()
    plain[0] += 1e-3
    assert_as_close(plain, plain, exact)
    with pytest.raises(AssertionError, match="root-mean-square"):
        assert_as_close((exact + 1e-4).float(), plain, exact)
    with pytest.raises(AssertionError, match="largest error nan"):
        assert_as_close(torch.full_like(plain, float("nan")), plain, exact)
    with pytest.raises(AssertionError, match="plain PyTorch's is"):
        assert_as_close(plain.double(), plain, exact)


def test_a_new_backend_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY["mlp"], "native", Implementation("d2vkern.reference.mlp"))
    monkeypatch.setitem(REGISTRY["mlp"], "triton", Implementation("d2vkern.reference.mlp"))
    rows = {row["variant"]: row for row in measure_case("mlp", _case("mlp", "text_tiny"), CPU)}
    assert rows["native"]["status"] == "ok" and rows["native"]["ours"]
    if not torch.cuda.is_available():
        assert rows["triton"]["status"] == "skipped" and "no CUDA device" in rows["triton"]["reason"]


def test_a_failed_gate_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = importlib.import_module("benchmarks.bench_mlp")
    case = _case("mlp", "text_tiny")
    wrong = dataclasses.replace(case, call=lambda inputs, backend: case.plain(inputs) + 1)
    monkeypatch.setattr(bench, "cases", lambda *_: [wrong])
    assert run.main(["--smoke", "--device", "cpu", "--presets", "text_tiny", "--ops", "mlp"]) == 1
    assert "FAILED gelu_mlp (student), text_tiny, eager: gate: out:" in capsys.readouterr().out


def test_variants_take_turns_in_rotating_order() -> None:
    order: list[str] = []
    runs = {name: [lambda name=name: order.append(name)] for name in "abc"}
    timed = time_variants(runs, dataclasses.replace(CPU, rounds=4))
    assert {name: found["rounds"] for name, found in timed.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(order)[-12:] == "abcbcacababc"


def test_compare_fails_on_slower_and_on_newly_wrong(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def exit_code(ours: float = 1.0, others: float = 1.0, status: str = "ok", threshold: str = "5%") -> int:
        new = copy.deepcopy(results)
        for row in new["rows"]:
            if row["status"] == "ok":
                row["us"] *= ours if row["ours"] else others
                if row["ours"] and row["stem"] == "mlp":
                    row |= {"status": status, "reason": "no compiler"}
        paths = tmp_path / "old.json", tmp_path / "new.json"
        for path, content in zip(paths, (results, new), strict=True):
            path.write_text(json.dumps(content))
        old, fresh = map(str, paths)
        return run.main(["--from", fresh, "--compare", old, "--fail-if-slower", threshold])

    assert exit_code() == 0
    assert exit_code(ours=1.04) == 0
    assert exit_code(ours=1.04, threshold="0.03") == 1
    assert exit_code(others=2.0) == 0
    capsys.readouterr()
    assert exit_code(ours=1.1) == 1
    assert "WORSE  1.100 gelu_mlp, student, text_tiny" in capsys.readouterr().out
    assert exit_code(status="skipped") == 1


def test_compare_refuses_other_schemas_and_disjoint_results(results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="new results must have schema 1, got None"):
        compare(results, {"rows": []}, 0.05)
    with pytest.raises(ValueError, match="no case of the new results"):
        compare(results, results | {"rows": [row | {"preset": "other"} for row in results["rows"]]}, 0.05)


def test_resume_measures_only_what_is_missing_or_failed(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(stem: str, case: Case, _: Settings) -> list[dict[str, Any]]:
        measured.append((stem, case.name))
        return []

    monkeypatch.setattr(run, "measure_case", measure)
    out = tmp_path / "out.json"
    before = copy.deepcopy(results)
    masks = [row for row in before["rows"] if row["stem"] == "masks"]
    masks[-1] |= {"status": "failed", "reason": "gate: mask"}
    out.write_text(json.dumps(before))
    tiny = ["--smoke", "--device", "cpu", "--presets", "text_tiny", "--resume", "--out", str(out)]
    assert run.main([*tiny, "--ops", "mlp", "masks", "targets"]) == 0
    assert measured == [("masks", masks[0]["case"]), ("targets", "top 3")]
    kept = json.loads(out.read_text())
    assert kept["rows"] == [row for row in results["rows"] if row["stem"] == "mlp"] and kept["complete"]
    out.write_text(json.dumps(before | {"provenance": before["provenance"] | {"commit": "0000000"}}))
    with pytest.raises(ValueError, match="resume: commit of the results must be .* as here, got '0000000'"):
        run.main([*tiny, "--ops", "mlp"])


@pytest.mark.gpu
def test_gpu_turns_are_cuda_graphs() -> None:
    settings = dataclasses.replace(CPU, device=torch.device("cuda"))
    for row in measure_case("mlp", _case("mlp", "text_tiny"), settings):
        if row["status"] == "ok":
            assert row["timing"] == "CUDA graph, events" and row["us"] > 0
