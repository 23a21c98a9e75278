"""Labelled texts, for probes and fine-tuning alike: GLUE's tables, .jsonl lines, the embedded text."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..embedded import text as stdlib
from ..splits import divide, to_divide, to_score
from ..types import DataError, Report
from ..walk import suffix_of
from .corpus import Files, json_lines


class Sentence(NamedTuple):
    """One sample."""

    texts: tuple[str, ...]
    """one or two"""
    label: str


class GlueTask(NamedTuple):
    """How a task's .tsv files are read: columns by the name in the header, or by number without one."""

    texts: tuple[str, ...]
    label: str
    evaluated: tuple[str, ...] = ("dev",)
    """stems of the files that are evaluated"""
    header: bool = True
    largest: float | None = None
    """of numbers as labels, which fairseq's preprocess_GLUE_tasks.sh divides by it"""


GLUE = {
    "cola": GlueTask(("3",), "1", header=False),
    "sst2": GlueTask(("sentence",), "label"),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality"),
    "stsb": GlueTask(("sentence1", "sentence2"), "score", largest=5.0),
    "qqp": GlueTask(("question1", "question2"), "is_duplicate"),
    "mnli": GlueTask(("sentence1", "sentence2"), "gold_label", ("dev_matched", "dev_mismatched")),
    "qnli": GlueTask(("question", "sentence"), "label"),
    "rte": GlueTask(("sentence1", "sentence2"), "label"),
}


def read_labelled(
    path: str, glue: str | None = None, *, numbers: bool = False, score: bool = False
) -> tuple[dict[str, list[Sentence]], Report]:
    """Samples of "train" and of one or more held-out parts, and the lines that cannot be read.

    From GLUE's train.tsv beside dev.tsv, where glue names the task; from .jsonl lines with "text", maybe
    "text2", and "label", a string or a number; or the embedded "text". Files at any depth of a folder are
    divided by their stems (train.jsonl beside dev.jsonl, ...), else all lines by `divide`.
    numbers: labels are numbers and no classes. score: what is held out alone, or all where nothing is.
    Raises DataError: "labels missing", too much unreadable, a part without a sample.
    """
    report = Report(path, 0)
    if glue is not None:
        parts = _read_glue(Path(path), glue, score)
    elif path == "text":
        parts = {
            part: [Sentence((text,), name) for text, name in zip(*found, strict=True)]
            for part, found in stdlib.paragraphs().items()
        }
    else:
        parts = _read_lines(path, report)
    report.total = report.total or sum(map(len, parts.values()))
    report.stop_if_too_many()
    if score:
        parts = to_score(parts)
    elif (whole := to_divide(parts, path)) is not None:
        division = divide(["" if numbers else sentence.label for sentence in whole])
        parts = {part: [whole[i] for i in some] for part, some in division.items()}
    for part, found in parts.items():
        if not found:
            raise DataError(f"data: {path}: part {part} holds no sample")
    return parts, report


def _read_lines(path: str, report: Report) -> dict[str, list[Sentence]]:
    """Of each part, or of one part `WHOLE`."""
    found = Files(path, report, "label")
    parts = {
        part: [file for i in some if suffix_of((file := found.files[i]).name) == ".jsonl"]
        for part, some in found.parts.items()
    }
    if not any(parts.values()):
        raise DataError(f'labels missing: {path}: labels come from .jsonl lines with "text" and "label"')
    return {part: _sentences(files, report) for part, files in parts.items()}


def _sentences(files: Iterable[Path], report: Report) -> list[Sentence]:
    found = []
    for name, entry in (line for file in files for line in json_lines(file, report)):
        label, second = entry.get("label"), entry.get("text2")
        if isinstance(label, bool) or not isinstance(label, (str, int, float)):
            raise DataError(f'labels missing: {name} has no "label" that is a string or a number')
        if second is not None and not isinstance(second, str):
            raise DataError(f'data: {name}: "text2" must be a string, got {second!r}')
        found.append(Sentence((entry["text"],) if second is None else (entry["text"], second), str(label)))
    return found


def _read_glue(root: Path, name: str, score: bool) -> dict[str, list[Sentence]]:
    if name not in GLUE:
        raise ValueError(f"finetune: glue must be one of {', '.join(GLUE)}, got {name!r}")
    task = GLUE[name]
    parts = {stem: root / f"{stem}.tsv" for stem in ([] if score else ["train"]) + list(task.evaluated)}
    for file in parts.values():
        if not file.is_file():
            raise DataError(f"data: {file} does not exist: GLUE's {name} folder holds it")
    return {part: _read_tsv(file, task) for part, file in parts.items()}


def _read_tsv(file: Path, task: GlueTask) -> list[Sentence]:
    """GLUE's files: tabs between columns, quotes that mean nothing."""
    found = []
    with file.open(encoding="utf-8", newline="") as opened:
        rows = csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(rows, []) if task.header else None
        wanted = (*task.texts, task.label)
        if header is not None and (absent := [name for name in wanted if name not in header]):
            raise DataError(f"data: {file} has no column {absent[0]!r}, its columns: {', '.join(header)}")
        places = [int(name) if header is None else header.index(name) for name in wanted]
        for number, row in enumerate(rows, 2 if task.header else 1):
            if len(row) <= max(places):
                raise DataError(
                    f"data: {file}, line {number}: {len(row)} columns, {max(places) + 1} are needed"
                )
            *texts, label = (row[place] for place in places)
            if task.largest is not None:
                label = _share(label, task.largest, f"{file}, line {number}")
            if label != "-":  # of MNLI: annotators did not agree
                found.append(Sentence(tuple(texts), label))
    return found


def _share(label: str, largest: float, where: str) -> str:
    try:
        return str(float(label) / largest)
    except ValueError:
        raise DataError(f"data: {where}: the label must be a number, got {label!r}") from None
