"""What becomes of measured rows: shares of the machine's ceilings, tables, files, comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
KEY = ("stem", "op", "case", "preset", "shape", "dtype", "direction", "variant")
NOT_MEASURED = "not measured"
MACHINE = ("device", "cpu", "gpu", "driver", "torch", "triton", "commit", "size")
"""facts of the provenance that all rows of a file share"""


def add_ceilings(rows: list[dict[str, Any]], copy: float, matmul: dict[str, float]) -> None:
    """Rates, the floor and the share of it, and the time over eager's, into every row that has a time.

    copy: bytes/s; matmul: FLOP/s by dtype name. The floor is the larger of bytes at the copy rate and FLOPs
    at the matmul rate; `share` is floor over time, so of whichever ceiling bounds the op.
    """
    eager = {_key(row)[:-1]: row["us"] for row in rows if row["variant"] == "eager" and row["status"] == "ok"}
    for row in rows:
        moving, computing = row["bytes"] / copy * 1e6, row["flops"] / matmul[row["dtype"]] * 1e6
        row["floor_us"] = max(moving, computing)
        row["bound"] = "copy" if moving >= computing else "matmul"
        if row["status"] == "ok":
            row["GB/s"] = row["bytes"] / row["us"] / 1e3
            row["GFLOP/s"] = row["flops"] / row["us"] / 1e3
            row["share"] = row["floor_us"] / row["us"]
            before = eager.get(_key(row)[:-1])
            row["against_eager"] = None if before is None else before / row["us"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one block per case and direction, variants side by side in lines."""
    lines: list[str] = []
    heading = None
    for row in rows:
        title = f"{row['op']} ({row['case']}), " + ", ".join(row[name] for name in KEY[3:-1])
        if title != heading:
            heading = title
            lines += ["", f"**{title}**: floor {row['floor_us']:.4g} us by {row['bound']}", "",
                      "| variant | us | IQR | GB/s | GFLOP/s | of ceiling | peak MiB | speed over eager |",
                      "|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
        if row["status"] != "ok":
            lines.append(f"| {row['variant']} | {row['status']}: {row['reason']} | | | | | | |")
            continue
        over = "" if row["against_eager"] is None else f"{row['against_eager']:.2f}"
        lines.append(
            f"| {row['variant']} | {row['us']:.4g} | {row['iqr_us']:.2g} | {row['GB/s']:.4g} "
            f"| {row['GFLOP/s']:.4g} | {row['share']:.0%} | {row['peak_MiB']:.4g} | {over} |"
        )
    return "\n".join(lines)


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> tuple[list[str], bool]:
    """Lines with new time over old, and whether one of our backends is too slow or gone wrong.

    threshold: 0.05 allows 5%. Only rows of ours count; torch's and peers' are shown. A row that had a time
    and now has a reason instead counts; a row that is absent this time does not.
    """
    for results, name in ((old, "old"), (new, "new")):
        if results.get("schema") != SCHEMA:
            raise ValueError(
                f"compare: {name} results must have schema {SCHEMA}, got {results.get('schema')!r}"
            )
    lines = []
    for field in ("cpu", "gpu", "driver", "torch", "triton", "threads"):
        before, now = old["provenance"].get(field), new["provenance"].get(field)
        if before != now:
            lines.append(f"note: {field} was {before}, is {now}")
    timed = {_key(row): row for row in old["rows"] if row["status"] == "ok"}
    worse = False
    for row in new["rows"]:
        before = timed.get(_key(row))
        if before is None:
            continue
        label = ", ".join(_key(row)[1:])
        if row["status"] != "ok":
            bad = row["ours"]
            lines.append(f"{'WORSE' if bad else '     '}      - {label}: {row['status']}: {row['reason']}")
        else:
            ratio = row["us"] / before["us"]
            bad = row["ours"] and ratio > 1 + threshold
            lines.append(f"{'WORSE' if bad else '     '} {ratio:6.3f} {label}")
        worse = worse or bad
    if len(timed) and not any(_key(row) in timed for row in new["rows"]):
        raise ValueError("compare: no case of the new results is in the old ones")
    return lines, worse


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write all or nothing: whoever is stopped by a time limit leaves the file of the last call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def check_same_machine(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError when results with these two provenances do not belong into one file."""
    for fact in MACHINE:
        if before.get(fact) != now.get(fact):
            raise ValueError(
                f"resume: {fact} of the results must be {now.get(fact)!r} as here, got {before.get(fact)!r}"
            )


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
        parts.append("incomplete" if self.data.get("complete") is False else None)
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


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)
