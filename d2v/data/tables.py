"""Tables beside pictures and sounds, which say what each file is: its class, its part, what is said in it.

A .csv (commas and quotes), a .tsv (tabs; quotes are text) or a .jsonl (an object a line) with a column of
file names is such a table, wherever below the data set's folder it lies: `metadata.csv` of a Hugging Face
folder, `meta/esc50.csv` beside `audio/`, `labels.csv` of a competition, a SpeechBrain .csv. Names are looked
for from the table's folder and from the data set's, else by the name of the file alone where one file has it.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .lines import lines_of, not_utf8
from .splits import WHOLE, kind_of, parts_of
from .types import DataError, Report
from .walk import suffix_of

FILES = ("file_name", "filename", "file", "path", "audio", "audio_filepath", "wav", "image", "fname")
"""columns of file names, the first that is there"""
CLASSES = ("label", "category", "class", "class_name", "target")
"""columns of classes, the first that is there"""
PARTS = ("split", "subset", "set", "partition")
"""columns of parts"""
TEXTS = ("transcription", "transcript", "text", "sentence", "wrd", "words")
"""columns of transcripts, the first that is there"""
LJSPEECH = ("file_name", "text", "transcription")
"""columns of LJSpeech's metadata.csv, which has bars between them and no header: the second is as written,
the third, which may be missing, as spoken"""
SUFFIXES = (".csv", ".tsv", ".jsonl")
PEEK = 1 << 20
"""bytes of a first line that are looked at to know a table"""
NOT_THERE = "named in a table but not there"
IN_NO_TABLE = "no table says what it is"


def columns_of(column: str, default: str, known: Sequence[str]) -> tuple[str, ...]:
    """The columns to look for: the one that a user names, or all known where that is the default."""
    return tuple(known) if column == default else (column,)


@dataclass(frozen=True)
class Table:
    """A table with a column of file names."""

    path: Path
    name: str
    """relative to the data set's folder"""
    columns: tuple[str, ...]
    file: str
    """its column of file names"""

    def first(self, wanted: Sequence[str]) -> str | None:
        """The first of some columns that it has."""
        return next((name for name in wanted if name in self.columns), None)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The line of each row, and the row. DataError for what is no row."""
        for number, row in _rows(self.path):
            if not isinstance(row.get(self.file), str) or None in row:
                raise DataError(f"data: {self.path}, line {number}: not a row with {self.file}")
            yield number, row


def tables_in(root: Path, names: Sequence[str], file_column: str = "") -> list[Table]:
    """Those of some tables that name files. names: relative to root. file_column: the column where they do,
    else the first of `FILES`."""
    found = []
    for name in names:
        columns = _columns(root / name)
        if file := next((one for one in ((file_column,) if file_column else FILES) if one in columns), ""):
            found.append(Table(root / name, name, columns, file))
    return found


class Names:
    """The files of a data set, by the names that its tables call them."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        """files: relative to root"""
        self.root, self.files = root, set(files)
        self.alone: dict[str, str | None] = {}
        for file in files:
            base = os.path.basename(file)
            for key in {base, os.path.splitext(base)[0]}:
                self.alone[key] = None if key in self.alone else file

    def find(self, table: Path, name: str) -> str | None:
        """The file that a table means; None where there is none, or more than one."""
        name = name.replace("$data_root/", "").replace("{data_root}/", "")
        for folder in (table.parent, self.root):
            path = os.path.normpath(folder / name)
            if (file := os.path.relpath(path, self.root)) in self.files or (file := path) in self.files:
                return file
        return self.alone.get(os.path.basename(name))


@dataclass
class Described:
    """What tables say of the files of a data set."""

    of: dict[str, str]
    """file -> class, or transcript"""
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """the numbers of the files of each part, as `splits.parts_of` has them; empty where tables know none"""


def read_described(
    root: Path, files: Sequence[str], tables: Sequence[Table], wanted: Sequence[str], report: Report
) -> Described | None:
    """What a column of tables says of the files of a data set; None where no table has it.

    files: relative to root. wanted: of each table the first of these columns is taken. The parts are those of
    a column of `PARTS`, else of tables named after parts. Files of rows that are not there are named in
    `report`; a row without a value says nothing. DataError for damaged tables, and for files with two values
    or parts.
    """
    tables = [table for table in tables if table.first(wanted)]
    names, found, missing = Names(root, files), Described({}), []
    by_table = parts_of([table.name for table in tables], str(root), stems=True) if len(tables) > 1 else {}
    part_of = {tables[i].name: part for part, some in by_table.items() for i in some.tolist()}
    parts: dict[str, str] = {}
    for table in tables:
        column, part = str(table.first(wanted)), table.first(PARTS)
        report.notes.append(f"{table.path} is followed by its column {column}")
        for number, row in table.rows():
            name, value = row[table.file], "" if row[column] is None else str(row[column]).strip()
            file = names.find(table.path, name)
            if file is None:
                missing.append(os.path.join(os.path.dirname(table.name), name))
            elif not value:
                continue
            elif found.of.setdefault(file, value) != value:
                raise DataError(f"data: {table.path}, line {number}: a second {column} of {name}")
            else:
                known = part_of.get(table.name, WHOLE)
                if part:
                    known = str(row[part] or "").strip().strip("/") or WHOLE
                if parts.setdefault(file, known) != known:
                    raise DataError(f"data: {table.path}, line {number}: a second part of {name}")
    if not found.of:
        return None
    report.leave_out(NOT_THERE, missing)
    if any(map(kind_of, parts.values())):
        divided = parts_of([f"{parts.get(file, WHOLE)}/file" for file in files], str(root))
        found.parts = {} if WHOLE in divided else divided
    return found


def _columns(file: Path) -> tuple[str, ...]:
    """The names of a table's columns; empty for what is none."""
    line = _first_line(file)
    if suffix_of(file.name) != ".jsonl":
        if _is_ljspeech(file, line):
            return LJSPEECH[: line.count("|") + 1]
        return tuple(name.strip() for name in next(csv.reader([line], **_form(file)), ()))
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    return tuple(first) if isinstance(first, dict) else ()


def _first_line(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.readline(PEEK).decode(errors="replace").removeprefix("\ufeff").rstrip("\r\n")


def _is_ljspeech(file: Path, line: str) -> bool:
    """Whether a table is LJSpeech's, by its name and first line."""
    return file.name == "metadata.csv" and "|" in line and "," not in line.partition("|")[0]


def _form(file: Path) -> dict[str, Any]:
    tabs = suffix_of(file.name) == ".tsv"
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = lines_of(file.read_bytes())
        if suffix_of(file.name) == ".jsonl":
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    yield number, row if isinstance(row, dict) else {}
            return
        form, header = _form(file), 1
        if lines and _is_ljspeech(file, lines[0]):
            form, header = {"delimiter": "|", "quoting": csv.QUOTE_NONE}, 0
        reader = csv.DictReader((f"{line}\n" for line in lines[header:]), _columns(file), **form)
        for row in reader:
            yield header + reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"data: {file}: {not_utf8(error)}") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(f"data: {file}: {error}") from None
