"""PNG plots of a run from its `metrics.jsonl`, for `d2v plot` and the end of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .progress import read_metrics

FIGURES: dict[str, tuple[str, list[str]]] = {
    "loss": ("loss per masked token", ["loss"]),
    "variance": ("deviation across tokens", ["target_var", "pred_var", "front_var"]),
    "rank": ("effective rank", ["front_rank", "pred_rank", "target_rank", "feature_rank"]),
    "gradient": ("gradient norm before clipping", ["grad_norm"]),
    "schedule": ("learning rate", ["lr"]),
    "speed": ("samples per second", ["samples_per_s"]),
}
"""file name -> (label of the y axis, keys of metrics.jsonl); `loss_*` keys join the loss figure, and keys
with a slash, scores of held-out parts, make a figure "scores" """


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values where `key` is a finite number."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def plot_run(run: str | Path) -> list[Path]:
    """Draw every figure that `run/metrics.jsonl` has values for into `run/plots`.

    Steps with an alarm are marked red on the variance and rank figures. Returns the files written.
    Raises FileNotFoundError without metrics and ValueError when there is no line yet.
    """
    rows = read_metrics(run)
    if not rows:
        raise ValueError(f"plot: {run} has no metrics yet")
    from matplotlib.figure import Figure  # a bare Figure draws with Agg: no display, no global state

    folder = Path(run) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    parts = sorted({key for row in rows for key in row if key.startswith("loss_")})
    scores = list(dict.fromkeys(key for row in rows for key in row if "/" in key))
    ranks = sorted({key for row in rows for key in row if key.startswith("feature_rank_layer")})
    written = []
    for name, (label, keys) in {**FIGURES, "scores": ("score", scores)}.items():
        wanted = [*keys, *(parts if name == "loss" and len(parts) > 1 else [])]
        wanted += ranks if name == "rank" else []
        series = {key: _series(rows, key) for key in wanted}
        series = {key: points for key, points in series.items() if points[0]}
        if not series:
            continue
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for key, (steps, values) in series.items():
            axes.plot(steps, values, label=key, linewidth=1.2, marker="o" if len(steps) == 1 else None)
        if name in ("variance", "rank"):
            for step in [row["step"] for row in rows if row.get("alarms")]:
                axes.axvline(step, color="red", alpha=0.15, linewidth=1)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend(frameon=False)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written
