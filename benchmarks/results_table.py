"""Result tables of README and docs/, and their plots, from benchmarks/results/*.json: `make results`.

    python -m benchmarks.results_table            rewrite what stands between the markers, and the plots
    python -m benchmarks.results_table --check    write nothing; exit 1 when a table differs from the JSON

A table stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`. The first word of a file's name
says which table it is in: `step_*.json` (bench_step.py, or run.py --ops step), `ops_*.json` (run.py),
`scaling_*.json` (scaling.py), `memory_*.json` (memory.py), `profile_*.json` (profile.json of `d2v profile`),
`demo_*.json` (summary.json of `d2v demo`), `race_*.json` (race.json of `d2v race`), `downstream_*.json`
(downstream.py), `data_*.json` (bench_data.py); the tables `hotpaths`, `best` and `fits_checked` are made from
the step's files too, and `fits` from the models (fits.py). No number is typed by hand: a table without a file
says "not measured", and so does a cell without a time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.bench_data import data_table
from benchmarks.downstream import downstream_rows
from benchmarks.fits import checked_table, fits_table
from benchmarks.op_goals import op_goals_table
from benchmarks.report import NOT_MEASURED, Results, markdown, percent, short
from benchmarks.step_table import best_table, goals_table, hot_paths_table, plot_steps, step_table
from d2v.tools.race_report import plot_race, race_rows

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- results:(\w+) -->\n)(.*?)(<!-- /results:\2 -->)", re.DOTALL)
MARKER = re.compile(r"<!-- /?results:\w+ -->")


def op_lines(found: Results) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """(a row for its keys, variant -> row) of every case, forward and backward together where both exist."""
    groups: dict[tuple[str, ...], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in found.data["rows"]:
        key = tuple(row[name] for name in ("op", "case", "preset", "shape", "dtype"))
        groups.setdefault(key, {}).setdefault(row["direction"], {})[row["variant"]] = row
    for directions in groups.values():
        variants = directions.get("forward+backward") or directions["forward"]
        yield next(iter(variants.values())), variants


def ops_table(found: Results) -> list[str]:
    """Microseconds of every variant; the share of the machine's ceiling and memory of our fastest."""
    ours: dict[str, None] = {}
    for row in found.data["rows"]:
        if row["ours"] and (row["variant"] == "eager" or row["status"] == "ok"):
            ours[row["variant"]] = None
    head = ["op", "preset", "shape", "floor us", *(f"{name} us" for name in ours), "of ceiling", "peak MiB",
            "torch.compile us", "best peer us"]  # fmt: skip
    cells = []
    for row, variants in op_lines(found):
        timed = {name: one for name, one in variants.items() if one["status"] == "ok"}
        best = min((one for one in timed.values() if one["ours"]), key=lambda one: one["us"], default={})
        peers = [one for name, one in timed.items() if not one["ours"] and name != "compile"]
        peer = min(peers, key=lambda one: one["us"], default=None)
        cells.append([
            f"{row['op']}, {row['case']}", row["preset"], f"{row['shape']} {row['dtype']}",
            short(row["floor_us"]), *(short(timed.get(name, {}).get("us")) for name in ours),
            percent(best.get("share")), short(best.get("peak_MiB")),
            short(timed.get("compile", {}).get("us")),
            NOT_MEASURED if peer is None else f"{short(peer['us'])} ({peer['variant']})",
        ])  # fmt: skip
    return markdown(head, cells, 3)


def scaling_table(found: Results) -> list[str]:
    """Ends of every curve and the fitted exponents."""
    cells = []
    for curve in found.data["curves"]:
        first, last = curve["points"][0], curve["points"][-1]
        cells.append([
            curve["preset"], f"{curve['axis']} {first['x']:g} to {last['x']:g}",
            f"{short(1e3 * first['seconds'])} to {short(1e3 * last['seconds'])}",
            f"{curve['time_exponent']:.2f}",
            f"{short(first['peak_MiB'])} to {short(last['peak_MiB'])}",
            f"{curve['memory_exponent']:.2f}",
        ])  # fmt: skip
    return markdown(["preset", "varied", "ms a step", "exponent", "peak MiB", "exponent"], cells, 2)


def profile_table(found: Results) -> list[str]:
    """Hot paths that take a hundredth of a step or more, of the first backend in the file."""
    report = found.data["reports"][0]
    cells = [
        [row["name"], short(1e3 * row["seconds"]), percent(row["share"]), short(row["calls"]),
         percent(row["of_copy"]) if row["bytes"] else "", percent(row["of_matmul"]) if row["flops"] else ""]
        for row in report["rows"] if row["share"] >= 0.01
    ]  # fmt: skip
    shape = "x".join(map(str, found.data["shape"]))
    title = (
        f"**{found.data['preset']}**, {found.data['precision']}, {report['backend']}, input {shape}: "
        f"{short(1e3 * report['wall'])} ms a step; named ranges cover {report['coverage']:.1%} of the time "
        f"in {'operators' if found.data['device'] == 'cpu' else 'kernels'}"
    )
    head = ["hot path", "ms", "share", "calls", "of copy rate", "of matmul rate"]
    return [title, "", *markdown(head, cells)]


def memory_table(found: Results) -> list[str]:
    """Peak MiB of attention: materialised bias, every backend, our smallest as a share of the first."""
    rows = found.data["rows"]
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("preset", "case", "shape", "dtype"))
        groups.setdefault(key, {})[row["variant"]] = row
    names = list(dict.fromkeys(row["variant"] for row in rows if row["status"] == "ok"))
    names = [name for name in names if name != "pytorch"]
    head = ["preset", "pass", "shape", "materialised MiB", *(f"{name} MiB" for name in names), "ours of it"]
    cells = []
    for (preset, case, shape, dtype), variants in groups.items():
        peaks = {name: row.get("peak_MiB") for name, row in variants.items()}
        ours = [row["peak_MiB"] for row in variants.values() if row["ours"] and row["status"] == "ok"]
        plain = peaks.get("pytorch")
        share = min(ours) / plain if ours and plain else None
        cells.append([preset, f"{case}, {next(iter(variants.values()))['direction']}", f"{shape} {dtype}",
                      short(plain), *(short(peaks.get(name)) for name in names), percent(share)])  # fmt: skip
    return markdown(head, cells, 3)


def demo_table(found: Results) -> list[str]:
    """Linear probes of raw input, the untrained and the trained encoder, in percent."""
    cells = []
    for name, task in found.data.items():
        if not (isinstance(task, dict) and "probe" in task):
            continue
        for split in task["probe"]["trained"]["linear"]:
            right = [100 * task["probe"][key]["linear"][split] for key in ("raw", "untrained", "trained")]
            knn = 100 * task["probe"]["trained"]["knn"][split]
            cells.append([name, task["label"], split, *(f"{value:.1f}" for value in right), f"{knn:.1f}",
                          f"{task['steps']:,}", short(task["seconds"])])  # fmt: skip
    head = ["", "probe for", "test split", "raw input %", "untrained %", "trained %", "trained, kNN %",
            "steps", "s"]  # fmt: skip
    return markdown(head, cells, 3)


def downstream_table(found: Results) -> list[str]:
    """Fine-tuned from pretraining against from scratch, and the commands."""
    head, *rows = downstream_rows(found.data)
    commands = [
        command
        for task in found.data["tasks"]
        for command in (task["pretraining"]["command"], task["runs"][0]["command"])
    ]
    return [*markdown(head, rows, 2), "", "The first seed's commands (from scratch: with `--scratch`):", "",
            "```bash", *commands, "```", "<!-- not run: minutes each -->"]  # fmt: skip


def race_table(found: Results) -> list[str]:
    """Accuracy at the end, time ratios, costs and baselines of a race."""
    race = found.data
    head, *rows = race_rows(race)
    seeds = len({track["seed"] for track in race["tracks"]})
    title = (
        f"{race['preset']} on {Path(race['data']).name}, {race['minutes']:g} minutes of training each, "
        f"{seeds} seeds, {race['labelled_rows']['train']:,} samples to fit probes, {race['classes']} classes:"
    )
    image = f"![accuracy over time](../benchmarks/results/{found.path.stem}.png)"
    return [title, "", *markdown(head, rows, 1), "", image]


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "step": step_table,
    "ops": ops_table,
    "profile": profile_table,
    "scaling": scaling_table,
    "memory": memory_table,
    "demo": demo_table,
    "race": race_table,
    "downstream": downstream_table,
    "data": data_table,
    "hotpaths": hot_paths_table,
}
SOURCES = {"hotpaths": "step", "best": "step", "fits_checked": "step"}
"""tables whose files carry another table's name"""
OF_ALL = {"best": best_table, "fits_checked": checked_table}
"""tables made of all files at once"""
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "performance.md")
KNOWN = (*TABLES, *OF_ALL, "fits")
PER_DEVICE = ("step", "ops", "profile", "scaling", "hotpaths", "memory")
"""tables that say what was not measured on a GPU"""


def load(folder: Path) -> dict[str, list[Results]]:
    """Table -> its files, by name. ValueError for a file that belongs to no table."""
    found: dict[str, list[Results]] = {name: [] for name in TABLES if name not in SOURCES}
    for path in sorted(folder.glob("*.json")):
        name = path.stem.split("_")[0]
        if name not in found:
            raise ValueError(f"results: {path.name} must begin with one of {', '.join(found)} and _")
        found[name].append(Results(path, json.loads(path.read_text(encoding="utf-8"))))
    return found


def section(name: str, files: Sequence[Results]) -> str:
    """What stands between the markers of a table."""
    if name == "fits":
        return "\n".join(["", *fits_table(), "", ""])
    if name in OF_ALL:
        return "\n".join(["", *OF_ALL[name](files), "", ""])
    tables = [(one, lines) for one in files if (lines := TABLES[name](one))]
    blocks = [[*lines, "", one.source] for one, lines in tables]
    if name in PER_DEVICE and not any(one.on_gpu for one, _ in tables):
        blocks.append([f"On a GPU: {NOT_MEASURED}."])
    if name == "step":
        blocks.append(goals_table(files))
    if name == "ops":
        blocks.append(op_goals_table(files))
    text = "\n\n".join("\n".join(block) for block in blocks) or f"{NOT_MEASURED.capitalize()}."
    return f"\n{text}\n\n"


def render(text: str, results: dict[str, list[Results]]) -> str:
    """The text with every marked table made anew. ValueError for markers that do not pair or are unknown."""
    if 2 * len(MARKED.findall(text)) != len(MARKER.findall(text)):
        raise ValueError("results: every <!-- results:NAME --> must be closed by its <!-- /results:NAME -->")
    for _, name, _, _ in MARKED.findall(text):
        if name not in KNOWN:
            raise ValueError(f"results: marker must be one of {', '.join(KNOWN)}, got {name}")

    def made(match: re.Match[str]) -> str:
        return match[1] + section(match[2], results.get(SOURCES.get(match[2], match[2]), [])) + match[4]

    return MARKED.sub(made, text)


def draw(results: dict[str, list[Results]], folder: Path) -> list[Path]:
    """A PNG beside every file that has a plot; one that is as it should be is not touched."""
    drawn = []
    for name, plot in PLOTS.items():
        for found in results[name]:
            path = folder / f"{found.path.stem}.png"
            before = path.read_bytes() if path.exists() else None
            fresh = path.with_suffix(".new.png")
            plot(found.data, fresh)
            if fresh.read_bytes() == before:
                fresh.unlink()
            else:
                fresh.replace(path)
                drawn.append(path)
    return drawn


def plot_ops(data: dict[str, Any], path: Path) -> None:
    """Share of the machine's ceiling that each variant reaches, a line of points per case."""
    from matplotlib.figure import Figure

    lines = list(op_lines(Results(path, data)))
    names = list(dict.fromkeys(name for _, variants in lines for name in variants))
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    for name in names:
        at = [(100 * variants[name]["share"], place) for place, (_, variants) in enumerate(lines)
              if variants.get(name, {}).get("status") == "ok"]  # fmt: skip
        if at:
            shares, places = zip(*at, strict=True)
            axes.plot(shares, places, "o", markersize=4, label=name)
    labels = [f"{row['op']}, {row['case']}, {row['preset']}, {row['dtype']}" for row, _ in lines]
    axes.set_yticks(range(len(lines)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="% of the ceiling, copy bandwidth or matmul rate, that bounds the op", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


PLOTS: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "step": plot_steps,
    "ops": plot_ops,
    "scaling": scaling.plot,
    "race": plot_race,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when --check finds a table that differs from the JSON; 2 for markers or files it cannot use."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, metavar="FILE")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing, name the tables that differ")
    given = parser.parse_args(arguments)
    try:
        results = load(given.results)
        before = {page: page.read_text(encoding="utf-8") for page in given.pages}
        after = {page: render(text, results) for page, text in before.items()}
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if given.check:
        differ = [
            (page, old[1])
            for page in before
            for old, new in zip(MARKED.findall(before[page]), MARKED.findall(after[page]), strict=True)
            if old != new
        ]
        for page, name in differ:
            print(f"{page}: table {name} is not what {given.results} gives: run `make results`")
        return int(bool(differ))
    for page, text in after.items():
        if text != before[page]:
            page.write_text(text, encoding="utf-8")
    for path in draw(results, given.results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
