"""`d2v profile`: traces folded into hot paths, their work by formula, and the command from end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from d2v.cli.main import main
from d2v.config.fronts import ImageFront, LogMelFront
from d2v.config.model import Objective
from d2v.config.objectives import for_objective
from d2v.config.presets import preset
from d2v.config.run import Config
from d2v.data.types import Batch
from d2v.tools.ceilings import rates
from d2v.tools.flops import step_flops, step_work
from d2v.tools.hotpaths import Event, fold, read_events
from d2v.tools.profile import run_profile
from d2v.tools.profile_report import Profile
from d2v.train.pretrain_step import Trainer
from d2vkern import BackendError
from d2vkern._nvtx import phase
from d2vkern.testing import backend_spy
from tests.d2v.test_flops import WAVEFORM
from tests.d2v.tiny_runs import make_data, tiny


def op(name: str, start: int, end: int, *, thread: int = 1, id: int = 0) -> Event:
    return Event("op", name, start, end, thread, id)


def named(name: str, start: int, end: int, *, thread: int = 1, id: int = 0) -> Event:
    return Event("range", name, start, end, thread, id)


def kernel(name: str, start: int, end: int, link: int) -> Event:
    return Event("kernel", name, start, end, link=link)


def nanoseconds(trace) -> dict[str, dict[int, int]]:
    return {name: dict(path.steps) for name, path in trace.rows.items() if path.steps}


def test_operators_belong_to_the_innermost_phase_or_the_outermost_op() -> None:
    trace = fold(
        [
            op("aten::before", 0, 5),
            named("d2v/step", 10, 200),
            named("d2v/teacher", 20, 120),
            op("aten::linear", 30, 50),
            op("aten::t", 31, 33),
            op("aten::addmm", 35, 49),
            op("aten::mul", 50, 57),
            named("d2vkern/adamw_ema/fwd/eager", 60, 100),
            op("aten::add", 62, 70),
            named("d2vkern/ema/fwd/eager", 70, 90),
            op("aten::mm", 71, 89),
            op("aten::stray", 130, 133),
            named("d2v/step", 300, 400),
            named("d2v/student/block07", 310, 320),
            op("aten::mul", 311, 315),
        ]
    )
    assert trace.steps == 2
    assert nanoseconds(trace) == {
        "teacher linear": {0: 20},
        "teacher other": {0: 7},
        "adamw_ema/fwd/eager": {0: 26},
        "student other": {1: 4},
    }
    assert trace.rows["teacher linear"].calls == 1
    assert trace.rows["adamw_ema/fwd/eager"].calls == 1
    assert dict(trace.unnamed) == {"aten::stray": 3}
    assert trace.nanoseconds == 60
    assert trace.coverage == pytest.approx(57 / 60)
    assert trace.seconds("teacher linear") == pytest.approx(10e-9)  # median of 20 and 0


def test_kernels_belong_where_they_were_launched() -> None:
    trace = fold(
        [
            named("d2v/step", 0, 100),
            named("d2v/backward", 10, 60),
            op("autograd::engine::evaluate_function: AddmmBackward0", 12, 30, thread=9, id=3),
            op("aten::mm", 13, 20, thread=9, id=4),
            op("aten::sum", 20, 28, thread=9, id=5),
            named("d2vkern/attention/bwd/triton", 31, 40, thread=9, id=6),
            op("d2vkern::loss_bwd", 41, 49, thread=9, id=9),
            named("d2vkern/loss/bwd/triton", 42, 48, thread=9, id=10),
            op("aten::copy_", 80, 90, id=7),
            op("aten::mm", 200, 210, id=8),
            kernel("gemm", 500, 700, link=4),
            kernel("reduce", 700, 730, link=5),
            kernel("attention_bwd_kernel", 730, 1730, link=6),
            kernel("loss_bwd_kernel", 700, 705, link=9),
            kernel("copy", 1730, 1740, link=7),
            kernel("later", 1740, 9999, link=8),
            kernel("nobody's", 0, 9999, link=77),
        ]
    )
    assert nanoseconds(trace) == {
        "backward linear": {0: 200},
        "backward other": {0: 30},
        "attention/bwd/triton": {0: 1000},
        "loss/bwd/triton": {0: 5},
    }
    assert trace.rows["attention/bwd/triton"].calls == 1
    assert trace.rows["attention/bwd/triton"].kernels == 1
    assert dict(trace.unnamed) == {"copy": 10}


def test_memory_peaks_are_running_totals() -> None:
    def memory(start: int, change: int) -> Event:
        return Event("memory", "[memory]", start, start, 1, bytes=change)

    trace = fold(
        [
            memory(5, 1000),
            named("d2v/step", 10, 100),
            named("d2v/teacher", 20, 40),
            memory(25, 64),
            memory(30, 32),
            memory(35, -64),
            named("d2v/decoder", 50, 60),
            memory(55, 16),
        ]
    )
    assert trace.peak == 96
    assert trace.rows["teacher other"].peak == 96
    assert trace.rows["decoder other"].peak == 48


def small(name: str) -> Config:
    """A base preset's widths, one block deep, in fp32 where a processor has no 16-bit products of its own."""
    cfg = preset(name)
    model = cfg.model
    model = dataclasses.replace(
        model,
        depth=1,
        prenet_depth=min(model.prenet_depth, 1),
        target=dataclasses.replace(model.target, top_k=1),
        mask=dataclasses.replace(model.mask, clones=2),
        decoder=dataclasses.replace(model.decoder, layers=min(model.decoder.layers, 2)),
    )
    data = dataclasses.replace(cfg.data, max_seconds=1.0, min_seconds=0.5, block=64)
    if not isinstance(model.front, ImageFront):
        data = dataclasses.replace(data, batch=1)
    return dataclasses.replace(
        cfg,
        model=model,
        data=data,
        train=dataclasses.replace(cfg.train, device="cpu", micro_batch=None, precision=PRECISION),
    )


PRECISION = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
CONFIGS = {
    **{modality: tiny(modality) for modality in ("image", "audio", "text")},
    **{name: small(name) for name in ("image_base", "audio_base", "text_base")},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_almost_all_of_the_step_is_named(name: str, tmp_path: Path) -> None:
    cfg = CONFIGS[name]
    result = run_profile(cfg, tmp_path, steps=3, batch=1, quick=True)
    (report,) = result.reports
    assert report.coverage >= 0.98
    # `forward` is around everything a model does: what only it names would be nameless without torch.compile
    vague = sum(row.share for row in report.rows if row.name.startswith("forward "))
    assert report.coverage - vague >= 0.98, report.rows
    assert sum(row.share for row in report.rows) + sum(report.unnamed.values()) == pytest.approx(1, abs=0.02)
    assert_work_is_all_there(cfg, result)


def test_a_compiled_model_keeps_the_phases_around_it() -> None:
    cfg = tiny("image", train={"backend": "eager"})
    front = cfg.model.front
    trainer = Trainer(cfg, torch.device("cpu"))
    trainer.model.forward = torch.compile(trainer.model.forward, fullgraph=True, backend="aot_eager")
    batch = Batch(torch.randn(2, front.channels, front.height, front.width), torch.arange(2), 0)
    trainer.step(1, [batch])
    traces = []
    for number in (2, 3, 4):  # on a busy machine one step may be interrupted between two ranges
        with profile(activities=[ProfilerActivity.CPU]) as profiler, phase("step"):
            trainer.step(number, [batch])
        traces.append(fold(read_events(profiler)))
    trace = max(traces, key=lambda trace: trace.coverage)
    assert trace.coverage >= 0.98
    ops = {name for name in trace.rows if "/" in name}
    assert ops == {"masks/fwd/eager", "grad_norm/fwd/eager", "adamw_ema/fwd/eager"}
    phases = {name.split()[0] for name in trace.rows} - ops
    assert phases == {"masks", "forward", "backward", "loss", "optimizer"}


def assert_work_is_all_there(cfg: Config, result: Profile) -> None:
    """Ops and linear layers are the work of the step; what its decoder spares is among the model FLOPs."""
    (report,) = result.reports
    counted, work = sum(row.flops for row in report.rows), step_work(cfg.model, result.shape).total
    assert counted == pytest.approx(work, rel=0.02), report.rows
    assert result.model_flops == step_flops(cfg.model, result.shape)
    if not isinstance(cfg.model.front, LogMelFront):  # whose input needs no gradient
        assert counted == work


def test_waveforms_and_prenets_are_counted_too(tmp_path: Path) -> None:
    cfg = tiny("audio")
    model = dataclasses.replace(cfg.model, front=WAVEFORM, prenet_depth=1)
    cfg = dataclasses.replace(cfg, model=model, data=dataclasses.replace(cfg.data, max_seconds=0.5))
    assert_work_is_all_there(cfg, run_profile(cfg, tmp_path, steps=1, batch=2, quick=True))


@pytest.mark.parametrize(("modality", "objective"), [("image", "mae"), ("text", "mlm")])
def test_rivals_are_profiled_too(modality: str, objective: Objective, tmp_path: Path) -> None:
    cfg = for_objective(tiny(modality), objective)
    assert_work_is_all_there(cfg, run_profile(cfg, tmp_path, steps=1, batch=2, quick=True, backend="eager"))


def test_three_layers_of_projection_are_counted(tmp_path: Path) -> None:
    cfg = tiny("image")
    decoder = dataclasses.replace(cfg.model.decoder, projection_layers=3)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, decoder=decoder))
    result = run_profile(cfg, tmp_path, steps=1, batch=2, quick=True, backend="eager")
    assert_work_is_all_there(cfg, result)
    calls = {row.name: row.calls for row in result.reports[0].rows}
    blocks = cfg.model.prenet_depth + cfg.model.depth
    # queries to values and the projection, of student and teacher; patches of both; the decoder's three
    assert calls["linear/fwd/eager"] == 2 * 2 * blocks + 2 + 3


def test_rows_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = tiny("text", train={"precision": "bf16"})
    result = run_profile(cfg, tmp_path, steps=3, batch=2, backend="eager", against="eager", quick=True)
    read = json.loads((tmp_path / "profile.json").read_text())
    assert read["shape"] == [2, 24] == list(result.shape)
    assert [report["backend"] for report in read["reports"]] == ["eager", "eager"]
    assert read["environment"]["torch"] == torch.__version__
    assert set(read["rates"]) == {"copy", "torch.float32", "torch.bfloat16"}
    rows = {row["name"]: row for row in read["reports"][0]["rows"]}
    norm = rows["residual_norm/fwd/eager"]
    # a student of 2 blocks and 2 versions, a teacher whose last block ends before its second norm
    m, tokens = cfg.model, 24
    kept = int(tokens * (1 - m.mask.prob))
    student, teacher = 2 * m.mask.clones * kept * m.dim * 2, 2 * tokens * m.dim * 2
    affine = 2 * m.dim * 4
    assert norm["calls"] == 7
    assert norm["bytes"] == 4 * (4 * student + affine) + 3 * (3 * teacher + affine)
    assert norm["flops"] == 0
    assert norm["of_copy"] == pytest.approx(norm["bytes"] / norm["seconds"] / read["rates"]["copy"])
    mlp = rows["mlp/bwd/eager"]
    assert mlp["of_matmul"] == pytest.approx(mlp["flops"] / mlp["seconds"] / read["rates"]["torch.bfloat16"])
    assert rows["linear/fwd/eager"]["calls"] == 2 * 4 and rows["linear/bwd/eager"]["calls"] == 4
    assert 0 < norm["peak"] <= read["reports"][0]["peak"]
    assert read["reports"][0]["wall"] > 0
    trace = json.loads((tmp_path / "trace_eager.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"d2v/student/block01", "d2vkern/attention/bwd/eager"} <= names
    for name in ("roofline.png", "hotpaths.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "eager ms  times" in printed
    assert "of it in named ranges" in printed


def test_each_column_runs_its_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever train.backend says, which is what neither is asked for."""
    seen: dict[str, set[str]] = {}
    step = Trainer.step

    def spied(self: Trainer, number: int, batches: list[Batch]) -> Any:
        with backend_spy() as calls:
            outcome = step(self, number, batches)
        seen.setdefault(self.cfg.train.backend, set()).update(
            name for stem, name in calls if stem == "attention"
        )
        return outcome

    monkeypatch.setattr(Trainer, "step", spied)
    cfg = tiny("text", train={"backend": "eager"})
    first = "eager,attention=sdpa"
    given = {"steps": 1, "batch": 2, "quick": True}
    found = run_profile(cfg, tmp_path / "a", backend=first, against="eager", **given)
    assert [report.backend for report in found.reports] == [first, "eager"]
    assert seen == {first: {"sdpa"}, "eager": {"eager"}}
    rows = [{row.name for row in report.rows if "attention/" in row.name} for report in found.reports]
    assert {name.rpartition("/")[2] for name in rows[0]} == {"sdpa"}
    assert {name.rpartition("/")[2] for name in rows[1]} == {"eager"}
    seen.clear()
    found = run_profile(cfg, tmp_path / "b", against="auto,attention=sdpa", **given)
    assert [report.backend for report in found.reports] == ["eager", "auto,attention=sdpa"]
    assert seen == {"eager": {"eager"}, "auto,attention=sdpa": {"sdpa"}}


def test_the_runs_own_data(tmp_path: Path) -> None:
    data = make_data("image", tmp_path / "data")
    result = run_profile(tiny("image"), tmp_path / "out", data=data, steps=1, batch=4, quick=True)
    assert result.shape[0] == 4
    assert any(row.name.startswith("data ") for row in result.reports[0].rows)


def test_batches_of_a_cpu_stay_small(tmp_path: Path) -> None:
    cfg = tiny("image")
    result = run_profile(cfg, tmp_path, steps=1, quick=True)
    assert result.shape[0] == cfg.data.batch
    assert step_flops(preset("image_base").model, (2, 3, 224, 224)) < 1e12


def test_requests_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'tritn'"):
        run_profile(tiny("image"), tmp_path / "a", steps=1, backend="eager,attention=tritn")
    with pytest.raises(ValueError, match="profile: steps and batch must be positive, got 0 and None"):
        run_profile(tiny("image"), tmp_path / "a", steps=0)
    assert not (tmp_path / "a").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(
        "d2v.tools.profile.rates", lambda device, dtypes, quick: rates(device, dtypes, quick=True)
    )
    out = str(tmp_path / "out")
    arguments = ["image_tiny", "--steps", "1", "--batch", "2", "--precision", "bf16", "--model.depth", "3"]
    assert main(["profile", *arguments, "--train.device", "cpu", "--out", out]) == 0
    assert capsys.readouterr().out.startswith("image_tiny, bf16, source (2,")
    assert main(["profile", "--steps", "1"]) == 2
    assert "the preset is missing; presets: image_tiny" in capsys.readouterr().err
    assert main(["profile", "image_tiny", "--backend", "tritn", "--out", out]) == 2
    assert "unknown backend 'tritn'" in capsys.readouterr().err


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v.tools.ceilings.median_seconds", lambda call, device: call() is not None and 2.0)
    found = rates(torch.device("cpu"), [torch.float32], quick=True)
    assert found == {"copy": 8 << 20, "torch.float32": 256.0**3}
