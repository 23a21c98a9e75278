"""Whole-step benchmarks: what is measured, the gate before every number, reasons, resuming.

Everything runs in this process, in the tiny presets; tests/test_gpu_script.py runs the real thing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_step, run, step_worker
from benchmarks.step_cases import VARIANTS, Case, Variant, size_of
from d2v.config.model import ModelConfig
from d2v.config.presets import preset as load_preset
from d2v.tools.flops import step_flops
from d2vkern._backend import REGISTRY


class SameProcess:
    """A ProcessPoolExecutor that does without processes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        pass


TINY_STEP = ["--smoke", "--device", "cpu", "--threads", "1", "--presets", "image_tiny", "--precision", "fp32"]


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "ProcessPoolExecutor", SameProcess)


def steps(out: Path, *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code of bench_step, and its rows by variant."""
    code = bench_step.main([*TINY_STEP, "--out", str(out), *more])
    return code, {row["variant"]: row for row in json.loads(out.read_text())["results"]}


def test_whole_steps_have_every_number_and_reasons_for_the_rest(
    same_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without the compiled extension, where auto is eager."""
    for stem, table in list(REGISTRY.items()):  # whole tables: an entry put back would stand last
        without = {name: one for name, one in table.items() if name not in ("native", "onednn")}
        monkeypatch.setitem(REGISTRY, stem, without)
    out = tmp_path / "step.json"
    code, rows = steps(out, "--variants", "eager", "auto", "cuda_graph", "--steps", "3")
    data = json.loads(out.read_text())
    assert code == 0 and data["complete"] and data["settings"] == {"layerdrop": 0.0, "steps": 3}
    assert data["provenance"]["size"] == "smoke" and data["provenance"]["threads"] == 1
    assert rows["cuda_graph"]["reason"] == "needs a CUDA device"
    assert rows["auto"]["reason"] == "auto chooses eager for every op here"
    assert all(
        rows[name]["status"] == "skipped" and "seconds" not in rows[name] for name in ("auto", "cuda_graph")
    )
    row = rows["eager"]
    assert (row["status"], row["shape"], row["against_eager"]) == ("ok", [2, 1, 24, 24], 1.0)
    assert row["seconds"] == sorted(row["all_seconds"])[1] and len(row["losses"]) == 3
    assert row["GFLOP"] == step_flops(load_preset("image_tiny").model, (2, 1, 24, 24)) / 1e9
    assert row["samples/s"] == pytest.approx(2 / row["seconds"])
    own = sum(row["matmul_GFLOP/s"]["fp32"]) / 2
    assert row["share_of_own_matmul"] == pytest.approx(row["GFLOP"] / row["seconds"] / own)
    assert row["warmup_seconds"] > 0 and row["peak_MiB"] > 50 and "original" not in row
    assert set(row["backends"].values()) == {"eager"} and {"attention", "adamw_ema"} <= row["backends"].keys()
    paths = row["hot_paths"]["rows"]
    assert sum(path["share"] for path in paths) == pytest.approx(row["hot_paths"]["coverage"], abs=0.02)
    assert {"linear/fwd/eager", "mlp/bwd/eager", "masks/fwd/eager"} <= {path["name"] for path in paths}


def test_only_steps_that_are_eagers_get_a_number(
    same_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Case.checkable_config

    def config(case: Case) -> Any:
        cfg = right(case)
        change = {
            "rate": {"optim": dataclasses.replace(cfg.optim, lr=1.1 * cfg.optim.lr)},
            "teacher": {"ema": dataclasses.replace(cfg.ema, decay=1.0, end_decay=1.0)},
            "seed": {"train": dataclasses.replace(cfg.train, seed=2)},
        }
        return dataclasses.replace(cfg, **change.get(case.variant, {}))

    monkeypatch.setattr(Case, "checkable_config", config)
    for name in ("same", "rate", "teacher", "seed"):
        monkeypatch.setitem(VARIANTS, name, Variant("eager"))
    monkeypatch.setitem(VARIANTS, "broken", Variant("nonsense"))
    code, rows = steps(tmp_path / "step.json", "--no-hot-paths", "--variants",
                       "broken", "same", "rate", "teacher", "seed")  # fmt: skip
    assert code == 1
    assert rows["same"]["status"] == "ok" and rows["same"]["gate"]["worst"] == 0.0
    assert "against_eager" not in rows["same"]  # eager itself was not measured
    assert "gate: loss of step 2 is" in rows["rate"]["reason"]
    assert "gate: loss of step 3 is" in rows["teacher"]["reason"]
    assert "gate: loss of step 1 is" in rows["seed"]["reason"]
    assert rows["broken"]["reason"].startswith("BackendError:")
    for name in ("rate", "teacher", "seed", "broken"):
        assert rows[name]["status"] == "failed" and not {"seconds", "samples/s"} & rows[name].keys()


def test_compiled_steps_are_eagers(
    same_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    code, rows = steps(tmp_path / "step.json", "--no-hot-paths", "--variants", "eager", "compile")
    assert code == 0, rows
    assert rows["compile"]["gate"]["worst"] < 1e-5 and rows["compile"]["against_eager"] > 0
    assert rows["compile"]["warmup_seconds"] > rows["eager"]["warmup_seconds"]


def test_gate_of_steps_is_relative_and_sees_nan() -> None:
    eager = {"loss": [2.0, 4.0], "gradient norm": [1.0, 1.0]}
    near = {"loss": [2.0, 4.002], "gradient norm": [1.0, 1.0]}
    assert bench_step.compare(near, eager, 1e-3) == pytest.approx(5e-4)
    with pytest.raises(AssertionError, match=r"loss of step 2 is 4.002, eager's is 4: off by 5.0e-04"):
        bench_step.compare(near, eager, 1e-4)
    with pytest.raises(AssertionError, match="gradient norm of step 1 is nan"):
        bench_step.compare(eager | {"gradient norm": [math.nan, 1.0]}, eager, 1.0)


def test_out_of_memory_halves_the_batch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("image_tiny", "fp32", "eager", "cpu", 16, smoke=True)
    fits = 4
    warm = step_worker._warm

    def short_of_memory(case: Case, measured: dict[str, Any]) -> Any:
        if case.batch > fits:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return warm(case, measured)

    monkeypatch.setattr(step_worker, "_warm", short_of_memory)
    step_worker.open_case(case)
    step_worker.turn(case)
    row = bench_step.numbers(case, step_worker.close_case(case))
    assert (row["batch"], row["out_of_memory_at"], row["shape"][0]) == (4, [16, 8], 4)
    assert row["samples/s"] == pytest.approx(4 / row["seconds"])
    assert "out of memory at a batch of [16, 8]" in bench_step.line(row | {"gate": {"worst": 0.0}})
    fits = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step_worker.open_case(case)


def test_resumed_steps_measure_only_what_is_missing_or_failed(
    same_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "step.json"
    asked = []

    def measure(preset: str, precision: str, settings: bench_step.Settings) -> list[dict[str, Any]]:
        asked.append((preset, precision))
        case = Case(preset, precision, "eager", "cpu", 1)  # type: ignore[arg-type]
        status = "failed" if (precision, len(asked)) == ("bf16", 2) else "skipped"
        return [bench_step.identity(case) | {"status": status, "reason": "no time"}]

    monkeypatch.setattr(bench_step, "measure", measure)
    both = ["--precision", "fp32", "bf16", "--variants", "eager", "--resume"]
    assert steps(out, *both)[0] == 1
    assert steps(out, *both)[0] == 0 and steps(out, *both)[0] == 0
    assert asked == [("image_tiny", "fp32"), ("image_tiny", "bf16"), ("image_tiny", "bf16")]
    with pytest.raises(ValueError, match="resume: size of the results must be 'cpu' as here, got 'smoke'"):
        bench_step.main(["--device", "cpu", "--resume", "--out", str(out)])


def test_step_configs_are_the_presets() -> None:
    for name in ("image_base", "audio_base", "text_base"):
        preset, case = load_preset(name), Case(name, "bf16", "compile", "cpu", 1)
        model = dataclasses.replace(preset.model, layerdrop=0.0)
        train = dataclasses.replace(preset.train, precision="bf16", device="cpu", compile=True)
        assert case.config() == dataclasses.replace(preset, model=model, train=train)
        assert _dropouts(case.checkable_config().model) == {0.0}
    assert _dropouts(load_preset("text_base").model) == {0.0, 0.1}


def _dropouts(model: ModelConfig) -> set[float]:
    parts = (model, model.decoder, model.front)
    return {
        getattr(part, f.name) for part in parts for f in dataclasses.fields(part) if "dropout" in f.name
    } | {model.layerdrop}


def test_step_sizes_are_the_designs_and_the_originals() -> None:
    def case(name: str, device: str) -> Case:
        return Case(name, "fp32", "eager", device, size_of(name, device).batch)

    assert case("image_base", "cuda").shape == (64, 3, 224, 224)
    assert case("audio_base", "cuda").shape == (16, 249_600)
    assert case("text_base", "cuda").shape == (16, 512)
    assert [round(case(f"{name}_base", "cuda").flops / 1e12) for name in ("image", "audio", "text")] == [
        26,
        36,
        31,
    ]
    original = case("image_base", "cpu").original
    assert original is not None and original["share"] == pytest.approx(0.59, abs=0.01)
    assert case("image_base", "cuda").original is None and case("image_large", "cpu").original is None


def test_run_measures_whole_steps_too(same_process: None, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert (
        run.main(["--smoke", "--device", "cpu", "--ops", "step", "--presets", "text_tiny", "--out", str(out)])
        == 0
    )
    data = json.loads(out.read_text())
    assert data["rows"] == [] and [row["status"] for row in data["steps"]] == ["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--resume"], "--resume needs --out"),
        (["--variants", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_arguments_of_bench_step(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_step.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_gpu_steps(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    arguments = ["--smoke", "--device", "cuda", "--presets", "image_tiny", "--out", str(out)]
    assert bench_step.main([*arguments, "--variants", "eager", "cuda_graph"]) == 0
    eager, graph = json.loads(out.read_text())["results"]
    assert eager["precision"] == "bf16" and eager["peak_MiB"] > 1 and graph["against_eager"] > 0
    assert len(graph["gate"]["loss"]) == 6
