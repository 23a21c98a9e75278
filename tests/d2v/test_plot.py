"""Plots are PNG files drawn from metrics.jsonl alone."""

import json
import subprocess
import sys

import pytest

from d2v.train.plot import plot_run
from d2v.train.progress import METRICS

PNG = b"\x89PNG\r\n\x1a\n"


def write(run, rows):
    run.mkdir(exist_ok=True)
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step, **extra):
    return {
        "step": step,
        "loss": 1 / step,
        "loss_regression": 1 / step,
        "target_var": 0.5,
        "lr": 1e-3,
        **extra,
    }


def test_only_figures_with_values_are_drawn(tmp_path):
    write(tmp_path, [row(step) for step in range(1, 5)])
    paths = plot_run(tmp_path)
    assert [p.name for p in paths] == ["loss.png", "variance.png", "schedule.png"]
    for path in paths:
        assert path.parent == tmp_path / "plots"
        assert path.read_bytes().startswith(PNG)


def test_skipped_steps_and_alarms_and_one_line_are_drawn(tmp_path):
    write(tmp_path / "a", [row(1, alarms=["front_rank"], front_rank=2.0), row(2, loss=None, grad_norm=None)])
    write(tmp_path / "b", [row(1)])
    assert "rank.png" in [p.name for p in plot_run(tmp_path / "a")]
    assert len(plot_run(tmp_path / "b")) == 3


def test_alarms_change_the_picture(tmp_path):
    write(tmp_path / "a", [row(s, alarms=[]) for s in (1, 2, 3)])
    write(tmp_path / "b", [row(s, alarms=["target_rank"]) for s in (1, 2, 3)])
    plain, marked = (
        next(p for p in plot_run(tmp_path / n) if p.stem == "variance").read_bytes() for n in "ab"
    )
    assert plain != marked


def test_a_run_without_lines_is_refused(tmp_path):
    write(tmp_path, [])
    with pytest.raises(ValueError, match="has no metrics yet"):
        plot_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere/metrics\.jsonl"):
        plot_run(tmp_path / "nowhere")


def test_matplotlib_is_imported_late():
    code = "import sys, d2v.train.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
