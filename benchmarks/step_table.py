"""Tables of whole steps, from the rows of bench_step.py: times, hot paths, goals; and their plot.

Rows of older files have no `variant` and no `status`: they are eager's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import NOT_MEASURED, Results, markdown, percent, short

Row = dict[str, Any]
NAMES = {"compile": "torch.compile"}
TOP_SHARE = 0.02
"""hot paths below this share of every step are left out of the table"""
BASE = ("image_base", "audio_base", "text_base")
GOALS = (
    ("share_of_own_matmul", "at least 50% of the measured matmul rate", 0.5),
    ("eager", "at least 3 times as fast as eager", 3.0),
    ("compile", "at least 1.3 times as fast as torch.compile", 1.3),
)


def step_rows(data: dict[str, Any]) -> list[Row]:
    """All rows of a file of bench_step.py, or of run.py --ops step."""
    return data["results"] if "results" in data else data["steps"]


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(preset, precision) -> variant -> row."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["preset"], row["precision"]), {})[row.get("variant", "eager")] = row
    return found


def step_table(found: Results) -> list[str]:
    """On a CPU a line per preset and precision, the original's beside it; on a GPU a line per variant."""
    rows = step_rows(found.data)
    if not rows:
        return []
    missing = [
        f"{row['preset']}, {row['precision']}, {row['variant']}: {row['status']}, {row['reason']}"
        for row in rows
        if row.get("status", "ok") != "ok"
    ]
    table = _gpu_table(rows) if found.on_gpu else _cpu_table(rows)
    return [*table, *([""] if missing else []), *(f"- {reason}" for reason in missing)]


def _cpu_table(rows: Sequence[Row]) -> list[str]:
    others = list(dict.fromkeys(["compile", *(row.get("variant", "eager") for row in rows)]))
    others.remove("eager")
    head = ["preset", "precision", "eager: s", "of fp32 matmul", "peak MiB"]
    for name in others:
        head += [f"{NAMES.get(name, name)}: s", "speed over eager", "peak MiB", "warm-up s"]
    head += ["original: s", "of fp32 matmul", "peak MiB"]
    cells = []
    for (preset, precision), variants in by_case(rows).items():
        eager = variants.get("eager", {})
        line = [preset, precision, short(eager.get("seconds")), percent(eager.get("share_of_fp32_matmul")),
                short(eager.get("peak_MiB"))]  # fmt: skip
        for name in others:
            row = variants.get(name, {})
            line += [
                short(row.get(key)) for key in ("seconds", "against_eager", "peak_MiB", "warmup_seconds")
            ]
        original: Row = next((row["original"] for row in variants.values() if row.get("original")), {})
        line += [short(original.get("seconds")), percent(original.get("share")), short(original.get("MiB"))]
        cells.append(line)
    return markdown(head, cells, 2)


def _gpu_table(rows: Sequence[Row]) -> list[str]:
    head = ["preset", "precision", "variant", "batch", "ms a step", "samples/s", "of matmul rate", "peak MiB",
            "speed over eager", "warm-up s"]  # fmt: skip
    cells = []
    for row in rows:
        name, seconds = row.get("variant", "eager"), row.get("seconds")
        cells.append(
            [row["preset"], row["precision"], NAMES.get(name, name), short(row.get("batch")),
             short(None if seconds is None else 1e3 * seconds), short(row.get("samples/s")),
             percent(row.get("share_of_own_matmul")), short(row.get("peak_MiB")),
             short(row.get("against_eager")), short(row.get("warmup_seconds"))]
        )  # fmt: skip
    return markdown(head, cells, 3)


def best_table(files: Sequence[Results]) -> list[str]:
    """A line for each preset and precision of each file: eager's step beside the fastest of ours."""
    lines = []
    for one in files:
        machine = str(one.facts.get("gpu") or one.facts.get("cpu"))
        for (preset, precision), variants in by_case(step_rows(one.data)).items():
            done = {name: row for name, row in variants.items() if row.get("status", "ok") == "ok"}
            ours = [name for name in done if name not in ("eager", *NAMES)]
            if "eager" not in done or not ours:
                continue
            name = min(ours, key=lambda name: done[name]["seconds"])
            eager, best = done["eager"]["seconds"], done[name]["seconds"]
            lines.append([machine, preset, precision, f"{1e3 * eager:,.0f}", f"{1e3 * best:,.0f} ({name})",
                          f"{eager / best:.2f}"])  # fmt: skip
    head = ["machine", "preset", "precision", "eager, ms a step", "d2v, ms a step", "times as fast"]
    return markdown(head, lines, 3) if lines else [f"{NOT_MEASURED.capitalize()}."]


def hot_paths_table(found: Results) -> list[str]:
    """Share of each hot path in the eager step, and in parentheses of the matmul rate that it reaches."""
    steps = {
        f"{row['preset']} {row['precision']}": {one["name"]: one for one in row["hot_paths"]["rows"]}
        for row in step_rows(found.data)
        if "rows" in row.get("hot_paths", {})
    }
    if not steps:
        return []
    largest: dict[str, float] = {}
    for paths in steps.values():
        for name, one in paths.items():
            largest[name] = max(largest.get(name, 0.0), one["share"])
    top = sorted((name for name in largest if largest[name] >= TOP_SHARE), key=lambda name: -largest[name])
    cells = [[name, *(_share(paths.get(name)) for paths in steps.values())] for name in top]
    return markdown(["hot path of the eager step", *steps], cells)


def _share(path: dict[str, Any] | None) -> str:
    if path is None:
        return ""
    rate = f" ({path['of_matmul']:.0%})" if path["of_matmul"] else ""
    return f"{path['share']:.1%}{rate}"


def goals_table(files: Sequence[Results]) -> list[str]:
    """What an H200 is to reach in bf16, and what the fastest of our variants reached there."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for one in files:
        if "H200" in str(one.facts.get("gpu")):
            cases |= by_case([row for row in step_rows(one.data) if row.get("status") == "ok"])
    cells = [
        [goal, *(_reached(kind, least, cases.get((name, "bf16"), {})) for name in BASE)]
        for kind, goal, least in GOALS
    ]
    return markdown(["goal on an H200, bf16", *BASE], cells)


def _reached(kind: str, least: float, variants: dict[str, Row]) -> str:
    """One goal of one preset; variants: rows with a time."""
    ours = [row for row in variants.values() if row["ours"]]
    if not ours or (kind in ("eager", "compile") and kind not in variants):
        return NOT_MEASURED
    best = max(ours, key=lambda row: row["samples/s"])
    value = best[kind] if kind in best else best["samples/s"] / variants[kind]["samples/s"]
    reached = percent(value) if kind == "share_of_own_matmul" else short(value)
    return f"{reached} ({best['variant']}): {'met' if value >= least else 'not met'}"


def plot_steps(data: dict[str, Any], path: Path) -> None:
    """Seconds a step as bars, the original's as a line across them."""
    from matplotlib.figure import Figure

    rows = [row for row in step_rows(data) if row.get("seconds") is not None]
    figure = Figure(figsize=(max(5, 0.9 * len(rows)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row.get("variant", "eager") for row in rows))
    for name in names:
        at = {place: row for place, row in enumerate(rows) if row.get("variant", "eager") == name}
        bars = axes.bar(list(at), [row["seconds"] for row in at.values()], 0.7, label=NAMES.get(name, name))
        axes.bar_label(bars, fmt="%.3g", fontsize=8, label_type="center", color="white")
    known = {place: row["original"]["seconds"] for place, row in enumerate(rows) if row.get("original")}
    if known:
        left, right = [place - 0.45 for place in known], [place + 0.45 for place in known]
        axes.hlines(list(known.values()), left, right, color="black", label="original, fp32")
    axes.set_xticks(range(len(rows)), [f"{row['preset']}\n{row['precision']}" for row in rows], fontsize=8)
    axes.set(ylabel="s a step")
    if rows:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
