"""Labelled texts, for probes and fine-tuning alike: tables (GLUE's, others), lines, the embedded text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ...config.run import DataConfig
from ..embedded import text as stdlib
from ..splits import WHOLE, divide, to_divide, to_score
from ..types import DataError, Report
from .corpus import Files
from .records import has_column, kind_of, records, split_rows, text_or_reason

SECOND = "text2"
"""key or column of the second text of a pair"""


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
    fields: int | None = None
    """of a line; that script leaves the others out, of which QQP has some"""


GLUE = {
    "cola": GlueTask(("3",), "1", header=False),
    "sst2": GlueTask(("sentence",), "label"),
    "mrpc": GlueTask(("#1 String", "#2 String"), "Quality"),
    "stsb": GlueTask(("sentence1", "sentence2"), "score", largest=5.0),
    "qqp": GlueTask(("question1", "question2"), "is_duplicate", fields=6),
    "mnli": GlueTask(("sentence1", "sentence2"), "gold_label", ("dev_matched", "dev_mismatched")),
    "qnli": GlueTask(("question", "sentence"), "label"),
    "rte": GlueTask(("sentence1", "sentence2"), "label"),
}


def read_labelled(
    path: str,
    glue: str | None = None,
    *,
    numbers: bool = False,
    score: bool = False,
    data: DataConfig | None = None,
) -> tuple[dict[str, list[Sentence]], Report]:
    """Samples of "train" and of one or more held-out parts, and the lines that cannot be read.

    From GLUE's train.tsv beside dev.tsv, where glue names the task; from .jsonl lines, or .csv, .tsv and
    .parquet tables, with "text", maybe "text2", and "label", a string or a number; or the embedded "text".
    Files at any depth of a folder are divided by their stems (train.jsonl beside dev.jsonl, ...), else all
    lines by `divide`. numbers: labels are numbers and no classes. score: what is held out alone, or all where
    nothing is. data: other names of "text" and "label".
    Raises DataError: "labels missing", too much unreadable, a part without a sample.
    """
    data = data or DataConfig()
    report = Report.of(path, data)
    if glue is not None:
        parts = _read_glue(Path(path), glue, score, report)
    elif path == "text":
        parts = {
            part: [Sentence((text,), name) for text, name in zip(*found, strict=True)]
            for part, found in stdlib.paragraphs().items()
        }
    else:
        parts = _read_lines(path, report, numbers, data)
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


def _read_lines(path: str, report: Report, numbers: bool, data: DataConfig) -> dict[str, list[Sentence]]:
    """Of each part, or of one part `WHOLE`."""
    found = Files(path, report, "label", data.text_column)
    parts = {
        part: [file for i in some if kind_of((file := found.files[i]).name) not in (".txt", "")]
        for part, some in found.parts.items()
    }
    if not any(parts.values()):
        raise DataError(
            f"labels missing: {path}: labels come from .jsonl lines, .csv, .tsv, .parquet or .arrow with "
            f'"{data.text_column}" and "{data.label_column}"'
        )
    found_in = {
        part: _sentences(files, report, numbers, data, held_out=part not in ("train", WHOLE))
        for part, files in parts.items()
    }
    return {part: some for part, some in found_in.items() if some is not None}


def _sentences(
    files: Iterable[Path], report: Report, numbers: bool, data: DataConfig, *, held_out: bool
) -> list[Sentence] | None:
    """Of one part; None for a part that is held out in tables without labels, as GLUE's tests are."""
    found = []
    names = (data.text_column,), (data.label_column, SECOND)
    files = list(files)
    if held_out and (bare := [file for file in files if not has_column(file, data.label_column)]):
        report.leave_out(f"held out without a column {data.label_column!r}", list(map(str, bare)))
        files = [file for file in files if file not in bare]
        if not files:
            return None
    for name, entry in (record for file in files for record in records(file, report, *names)):
        text, reason = text_or_reason(entry, data.text_column)
        if reason:
            report.unreadable[name] = reason
            continue
        label = _label(entry.get(data.label_column), data.label_column, numbers, name)
        second = entry.get(SECOND)
        if second is not None and (reason := text_or_reason(entry, SECOND)[1]):
            raise DataError(f"data: {name}: {reason}")
        found.append(Sentence((text,) if second is None else (text, second), label))
    return found


def _label(value: Any, column: str, numbers: bool, where: str) -> str:
    """A class's name, of 1 and of 1.0 the same, or a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == "":
        raise DataError(
            f'labels missing: {where} has no "{column}" that is a string or a number, got {value!r}'
        )
    if numbers or isinstance(value, float):
        number = _number(value, where)
        if number.is_integer() and abs(number) < 1 << 53 and not isinstance(value, str):
            return str(int(number))
    return text_or_reason({column: str(value)}, column)[0]


def _number(label: Any, where: str) -> float:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"data: {where}: the label must be a number, got {label!r}")
    return number


def _read_glue(root: Path, name: str, score: bool, report: Report) -> dict[str, list[Sentence]]:
    if name not in GLUE:
        raise ValueError(f"finetune: glue must be one of {', '.join(GLUE)}, got {name!r}")
    task = GLUE[name]
    parts = {stem: root / f"{stem}.tsv" for stem in ([] if score else ["train"]) + list(task.evaluated)}
    for file in parts.values():
        if not file.is_file():
            raise DataError(f"data: {file} does not exist: GLUE's {name} folder holds it")
    return {part: _read_tsv(file, task, report) for part, file in parts.items()}


def _read_tsv(file: Path, task: GlueTask, report: Report) -> list[Sentence]:
    """GLUE's files: tabs between columns, quotes that mean nothing."""
    found: list[Sentence] = []
    wanted = (*task.texts, task.label)
    places = None if task.header else [int(name) for name in wanted]
    for name, row in split_rows(file, report):
        if places is None:
            if absent := [column for column in wanted if column not in row]:
                raise DataError(f"data: {file} has no column {absent[0]!r}, its columns: {', '.join(row)}")
            places = [row.index(column) for column in wanted]
            continue
        report.total += 1
        if task.fields is not None and len(row) != task.fields:
            report.skip(f"not {task.fields} columns", [name])
        elif len(row) <= max(places):
            report.unreadable[name] = f"{len(row)} columns, {max(places) + 1} are needed"
        else:
            *texts, label = (row[place] for place in places)
            if task.largest is not None:
                label = str(_number(label, name) / task.largest)
            if label == "-":
                report.skip("label -: annotators did not agree", [name])
            else:
                found.append(Sentence(tuple(texts), label))
    return found
