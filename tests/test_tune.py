"""Tuning without a GPU: what would be measured, what a measurement decides, and what becomes of the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune  # noqa: E402
from benchmarks.aot_record import triton_stems  # noqa: E402
from benchmarks.bench_residual_norm import cases  # noqa: E402
from benchmarks.cases import Inputs, Outputs, Settings  # noqa: E402
from benchmarks.tune import Choice, best, choices_of, write  # noqa: E402
from d2vkern.kernels import _tuning  # noqa: E402
from d2vkern.kernels._tuning import choose  # noqa: E402

CPU = Settings(device=torch.device("cpu"), rounds=2, turn_seconds=0.0, budget_seconds=0.1, most_sets=1)


@pytest.fixture(scope="module")
def choices() -> list[Choice]:
    return choices_of(triton_stems(), ["image_tiny", "text_tiny"], ["bf16"])


def test_choices_are_distinct_and_have_alternatives(choices: list[Choice]) -> None:
    keys = [(choice.kernel, choice.bucket) for choice in choices]
    assert choices and len(keys) == len(set(keys))
    for choice in choices:
        distinct = {json.dumps(config, sort_keys=True) for config in choice.candidates}
        assert len(distinct) == len(choice.candidates) > 1, choice.kernel
        assert all(config.get("num_warps", 4) in (1, 2, 4, 8, 16) for config in choice.candidates), (
            choice.kernel
        )


def test_backward_kernels_are_measured_through_backward(choices: list[Choice]) -> None:
    directions = {choice.kernel: choice.direction for choice in choices}
    assert {kernel for kernel in directions if "_bwd_" in kernel} <= {
        kernel for kernel, direction in directions.items() if direction == "forward+backward"
    }


def test_dry_run_lists_choices_and_candidates(
    capsys: pytest.CaptureFixture[str], choices: list[Choice]
) -> None:
    assert tune.main(["--dry-run", "--presets", "image_tiny", "text_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    candidates = sum(len(choice.candidates) for choice in choices)
    assert lines[-1] == f"{len(choices)} choices, {candidates} candidates"
    assert sum(line.startswith("    ") for line in lines) == candidates
    assert any(line.startswith(f"{choices[0].kernel} ({choices[0].bucket}): ") for line in lines)


def test_measuring_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(["--presets", "image_tiny", "--ops", "masks"])
    assert "needs a GPU; --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([10.0, 9.0, 9.5], 1),
        ([10.0, 9.9, 12.0], None),
        ([10.0, 11.0, 12.0], None),
        ([None, 11.0, 10.5], 2),
        ([10.0, None, 8.0], 2),
        ([None, None, None], None),
    ],
    ids=["faster", "too little", "default", "default fails", "another fails", "all fail"],
)
def test_best(times: list[float | None], expected: int | None) -> None:
    rows: list[dict[str, Any]] = [
        {"config": {"num_warps": 1 << i}} | ({"failed": "gate"} if us is None else {"us": us})
        for i, us in enumerate(times)
    ]
    assert best(rows) == (None if expected is None else {"num_warps": 1 << expected})


def test_writer_replaces_one_gpu_and_only_measured_kernels(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    old = {
        "GPU A": {"x_kernel": {"rows64": {"num_warps": 8}}, "y_kernel": {"rows64": {"num_warps": 2}}},
        "GPU B": {"x_kernel": {"rows64": {"num_warps": 1}}},
    }
    path.write_text(json.dumps(old))
    write(path, "GPU A", ["x_kernel"], {("x_kernel", "rows128"): {"num_warps": 4}})
    assert json.loads(path.read_text()) == {
        "GPU A": {"x_kernel": {"rows128": {"num_warps": 4}}, "y_kernel": {"rows64": {"num_warps": 2}}},
        "GPU B": old["GPU B"],
    }
    write(path, "GPU A", ["x_kernel", "y_kernel"], {})
    assert json.loads(path.read_text()) == {"GPU B": old["GPU B"]}
    assert path.read_text().endswith("}\n")


def test_what_is_written_is_what_a_kernel_then_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(_tuning, "TABLE", path)
    monkeypatch.setattr(_tuning, "_gpu", lambda: "GPU A")
    _tuning.read_table.cache_clear()
    try:
        write(path, "GPU A", ["x_kernel"], {("x_kernel", "rows64"): {"num_warps": 4}})
        default = [{"num_warps": 1}, {"num_warps": 4}]
        assert _tuning.choose("x_kernel", "rows64", default) == {"num_warps": 4}
        assert _tuning.choose("x_kernel", "rows128", default) == {"num_warps": 1}
    finally:
        _tuning.read_table.cache_clear()


def test_every_candidate_is_gated_forced_and_timed() -> None:
    """Eager stands in for a kernel with a wrong candidate, and notes which one is forced when it runs."""
    candidates = ({"num_warps": 1}, {"num_warps": 2}, {"num_warps": 4})
    case = cases("text_tiny", "smoke", torch.float32)[0]
    seen: list[int] = []

    def call(inputs: Inputs, backend: str | None) -> Outputs:
        out = case.call(inputs, "eager")
        if backend == "triton":
            seen.append(choose("x_kernel", "rows64", candidates)["num_warps"])
            return out + 1 if seen[-1] == 2 else out
        return out

    choice = Choice("x_kernel", "rows64", candidates, replace(case, call=call), "forward+backward")
    rows = tune.measure(choice, CPU)
    assert [row["config"] for row in rows] == list(candidates)
    assert rows[1]["failed"].startswith("AssertionError: out: largest error")
    assert all(math.isfinite(rows[i]["us"]) and rows[i]["us"] > 0 for i in (0, 2))
    assert seen.count(1) > 1 and seen.count(2) == 1 and seen.count(4) > 1
    assert choose("x_kernel", "rows64", candidates) == candidates[0]
