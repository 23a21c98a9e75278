"""README's result tables and their plots, made from benchmarks/results/*.json: `make results`.

    python -m benchmarks.results_table            rewrite what stands between the markers, and the plots
    python -m benchmarks.results_table --check    write nothing; exit 1 when a table differs from the JSON

A table stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`. The first word of a file's name
says which table it is in: `step_*.json` (bench_step.py, or run.py --ops step), `ops_*.json` (run.py),
`scaling_*.json` (scaling.py), `profile_*.json` (profile.json of `d2v profile`), `demo_*.json` (summary.json
of `d2v demo`). No number is typed by hand: a table without a file says "not measured", and so does a cell
without a time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import scaling

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "not measured"
MARKED = re.compile(r"(<!-- results:(\w+) -->\n)(.*?)(<!-- /results:\2 -->)", re.DOTALL)
MARKER = re.compile(r"<!-- /?results:\w+ -->")


@dataclass(frozen=True)
class Results:
    """One file of results."""

    path: Path
    data: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """Hardware, versions, commit and date under one set of names, whoever wrote the file."""
        found: dict[str, Any] = {}
        for part in ("machine", "environment", "provenance"):
            found |= self.data.get(part, {})
        found.setdefault("threads", found.get("torch_threads"))
        if self.data.get("device") != "cpu":
            found.setdefault("gpu", next(iter(found.get("gpus", [])), None))
        return found

    @property
    def on_gpu(self) -> bool:
        return bool(self.facts.get("gpu"))

    @property
    def source(self) -> str:
        """Where the numbers come from, in a line."""
        facts = self.facts
        parts = [facts.get("gpu") or facts.get("cpu") or facts.get("device")]
        parts += [f"{key} {facts[key]}" for key in ("cores", "threads") if facts.get(key)]
        parts += [f"{key} {facts[key]}" for key in ("driver", "torch", "triton") if facts.get(key)]
        if facts.get("commit"):
            changed = " with changes" if facts.get("uncommitted_changes") else ""
            parts.append(f"commit {facts['commit'][:7]}{changed}")
        parts.append(str(facts["date"])[:10] if facts.get("date") else None)
        return f"`{self.path.name}`: {', '.join(part for part in parts if part)}."


def short(value: float | None) -> str:
    """Three digits, no exponent; None is what was not measured."""
    return NOT_MEASURED if value is None else f"{float(f'{value:.3g}'):,.10g}"


def percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """A table; the first `words` columns are text, the others numbers."""
    rule = ["---" if i < words else "---:" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def step_table(found: Results) -> list[str]:
    """Whole training steps, the original's beside them where it was measured."""
    rows = found.data["results"] if "results" in found.data else found.data["steps"]
    variants = any("variant" in row for row in rows)
    head = ["preset", "precision", *["variant"] * variants, "s a step", "of fp32 matmul", "peak MiB",
            "original: s", "of fp32 matmul", "peak MiB"]  # fmt: skip
    cells = []
    for row in rows:
        original = row.get("original") or {}
        cells.append(
            [row["preset"], row["precision"], *[row.get("variant", "")] * variants, short(row.get("seconds")),
             percent(row.get("share_of_fp32_matmul")), short(row.get("peak_MiB")),
             short(original.get("seconds")), percent(original.get("share")), short(original.get("MiB"))]
        )  # fmt: skip
    return markdown(head, cells, 2 + variants)


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


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "step": step_table,
    "ops": ops_table,
    "profile": profile_table,
    "scaling": scaling_table,
    "demo": demo_table,
}
PER_DEVICE = ("step", "ops", "profile", "scaling")
"""tables that say what was not measured on a GPU"""


def load(folder: Path) -> dict[str, list[Results]]:
    """Table -> its files, by name. ValueError for a file that belongs to no table."""
    found: dict[str, list[Results]] = {name: [] for name in TABLES}
    for path in sorted(folder.glob("*.json")):
        name = path.stem.split("_")[0]
        if name not in TABLES:
            raise ValueError(f"results: {path.name} must begin with one of {', '.join(TABLES)} and _")
        found[name].append(Results(path, json.loads(path.read_text(encoding="utf-8"))))
    return found


def section(name: str, files: Sequence[Results]) -> str:
    """What stands between the markers of a table."""
    blocks = [[*TABLES[name](one), "", one.source] for one in files]
    if name in PER_DEVICE and not any(one.on_gpu for one in files):
        blocks.append([f"On a GPU: {NOT_MEASURED}."])
    lines = "\n\n".join("\n".join(block) for block in blocks) or f"{NOT_MEASURED.capitalize()}."
    return f"\n{lines}\n\n"


def render(text: str, results: dict[str, list[Results]]) -> str:
    """The text with every marked table made anew. ValueError for markers that do not pair or are unknown."""
    if 2 * len(MARKED.findall(text)) != len(MARKER.findall(text)):
        raise ValueError("results: every <!-- results:NAME --> must be closed by its <!-- /results:NAME -->")
    for _, name, _, _ in MARKED.findall(text):
        if name not in TABLES:
            raise ValueError(f"results: marker must be one of {', '.join(TABLES)}, got {name}")
    return MARKED.sub(lambda match: match[1] + section(match[2], results[match[2]]) + match[4], text)


def draw(results: dict[str, list[Results]], folder: Path) -> list[Path]:
    """A PNG beside every file of steps, ops and scaling; one that is as it should be is not touched."""
    drawn = []
    for name, plot in {"step": plot_steps, "ops": plot_ops, "scaling": scaling.plot}.items():
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


def plot_steps(data: dict[str, Any], path: Path) -> None:
    """Seconds a step as bars, the original's as a line across them."""
    from matplotlib.figure import Figure

    rows = [row for row in (data.get("results") or data["steps"]) if row.get("seconds") is not None]
    figure = Figure(figsize=(max(5, 1.1 * len(rows)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    bars = axes.bar(places, [row["seconds"] for row in rows], 0.7, label="d2v")
    axes.bar_label(bars, fmt="%.2f", fontsize=8, label_type="center", color="white")
    known = {place: row["original"]["seconds"] for place, row in enumerate(rows) if row.get("original")}
    if known:
        left, right = [place - 0.45 for place in known], [place + 0.45 for place in known]
        axes.hlines(list(known.values()), left, right, color="black", label="original")
    axes.set_xticks(places, [_words(row) for row in rows], fontsize=8)
    axes.set(ylabel="s a step")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _words(row: dict[str, Any]) -> str:
    return "\n".join(str(row[key]) for key in ("preset", "precision", "variant") if key in row)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when --check finds a table that differs from the JSON; 2 for markers or files it cannot use."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="write nothing, name the tables that differ")
    given = parser.parse_args(arguments)
    try:
        results = load(given.results)
        before = given.readme.read_text(encoding="utf-8")
        after = render(before, results)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if given.check:
        pairs = zip(MARKED.findall(before), MARKED.findall(after), strict=True)
        differ = [old[1] for old, new in pairs if old != new]
        for name in differ:
            print(f"{given.readme}: table {name} is not what {given.results} gives: run `make results`")
        return int(bool(differ))
    if after != before:
        given.readme.write_text(after, encoding="utf-8")
    for path in draw(results, given.results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
