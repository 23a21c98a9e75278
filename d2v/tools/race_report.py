"""What a race comes to: the time ratio to what each rival reaches, a table, a plot.

The threshold of a rival is the best accuracy that it reaches in its whole budget, so a ratio above 1 says how
many times sooner data2vec 2.0 gets there, below 1 that it gets there later. Accuracy is that of the linear
probe on the last held-out part (an unseen voice where there is one).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERO = "data2vec2"

Curve = list[tuple[float, float]]
"""(seconds, share right), by time"""


def curve_of(track: Mapping[str, Any], part: str) -> Curve:
    """The linear probe of one track on a held-out part."""
    return [(point["seconds"], point["scores"][f"linear/{part}"]) for point in track["points"]]


def time_to(curve: Curve, accuracy: float) -> float | None:
    """Seconds until the curve first reaches `accuracy`, linear between probes; None if it never does."""
    before = curve[0]
    for point in curve:
        if point[1] >= accuracy:
            (t0, y0), (t1, y1) = before, point
            return t1 if y1 <= y0 else t0 + (t1 - t0) * max(0.0, accuracy - y0) / (y1 - y0)
        before = point
    return None


def best_of(curve: Curve) -> tuple[float, float]:
    """(seconds, share right) where the curve is highest for the first time."""
    return max(curve, key=lambda point: (point[1], -point[0]))


def tracks_of(race: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Entry -> its tracks, one for each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for track in race["tracks"]:
        found.setdefault(track["entry"], []).append(track)
    return found


def ratios(race: Mapping[str, Any], rival: str, part: str) -> list[float | None]:
    """Of each seed: the rival's time to its best accuracy over data2vec 2.0's time to the same.

    None where data2vec 2.0 never gets there; inf where its untrained encoder is there already.
    """
    tracks = tracks_of(race)
    found: list[float | None] = []
    for ours, theirs in zip(tracks[HERO], tracks[rival], strict=True):
        seconds, accuracy = best_of(curve_of(theirs, part))
        needed = time_to(curve_of(ours, part), accuracy)
        found.append(None if needed is None else seconds / needed if needed else math.inf)
    return found


def race_rows(race: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table, the head first."""
    part = race["parts"][-1]
    head = ["", f"{part}, linear probe at the end, %", "best, %", "time to its best over data2vec 2.0's",
            "samples", "GFLOP in all", "peak MiB of a step", "learning rate"]  # fmt: skip
    rows, entries = [head], tracks_of(race)
    for entry, tracks in entries.items():
        curves = [curve_of(track, part) for track in tracks]
        ended = [100 * curve[-1][1] for curve in curves]
        best = [100 * best_of(curve)[1] for curve in curves]
        against = ""
        if HERO in entries and entry not in (HERO, "supervised"):
            against = ", ".join(map(_ratio, ratios(race, entry, part)))
        samples = statistics.mean(track["points"][-1]["samples"] for track in tracks)
        flops = (
            statistics.mean(track["flops_per_step"] * track["points"][-1]["step"] for track in tracks) / 1e9
        )
        rows.append([
            entry, spread(ended), spread(best), against, f"{samples:,.0f}", f"{flops:,.0f}",
            f"{tracks[0]['peak_bytes'] / 2**20:,.1f}", f"{tracks[0]['lr']:.1e}",
        ])  # fmt: skip
    untrained = [100 * curve_of(track, part)[0][1] for track in next(iter(entries.values()))]
    rows.append(["untrained encoder", spread(untrained), *[""] * 6])
    rows.append(["raw input", f"{100 * race['raw'][f'linear/{part}']:.1f}", *[""] * 6])
    rows.append(["most frequent class", f"{100 * race['majority'][part]:.1f}", *[""] * 6])
    return rows


def _ratio(value: float | None) -> str:
    return "never" if value is None else "at once" if math.isinf(value) else f"{value:.1f}"


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, the deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def race_lines(race: Mapping[str, Any]) -> list[str]:
    """The table in aligned columns."""
    rows = race_rows(race)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    seeds = len({track["seed"] for track in race["tracks"]})
    return [
        f"{race['preset']} on {race['data']}: {race['minutes']:g} minutes of training each, {seeds} seeds",
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
    ]


def plot_race(race: Mapping[str, Any], path: Path) -> Path:
    """One panel for each held-out part: mean accuracy over time, every seed thin behind it."""
    from matplotlib.figure import Figure

    parts = race["parts"]
    figure = Figure(figsize=(5.5 * len(parts) + 1, 4.2), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for number, (entry, tracks) in enumerate(tracks_of(race).items()):
            colour, curves = f"C{number}", [curve_of(track, part) for track in tracks]
            for curve in curves:
                axes.plot(*_columns(curve), color=colour, linewidth=0.6, alpha=0.5)
            mean = [
                tuple(map(statistics.mean, zip(*points, strict=True))) for points in zip(*curves, strict=True)
            ]
            axes.plot(*_columns(mean), color=colour, linewidth=2, label=entry)
        axes.axhline(100 * race["raw"][f"linear/{part}"], color="grey", linestyle="--", label="raw input")
        axes.axhline(100 * race["majority"][part], color="grey", linestyle=":", label="most frequent class")
        axes.set(
            xlabel="seconds of training", ylabel="linear probe, % right", title=f"{race['preset']}: {part}"
        )
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _columns(curve: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in curve], [100 * point[1] for point in curve]
