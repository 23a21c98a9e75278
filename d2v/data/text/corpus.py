"""Where text lies: .txt files (one document each), .jsonl files, .csv, .tsv and .parquet tables (one document
a line or row, its "text" or another column), tar shards of texts, or the standard library. A document that is
not UTF-8, or a line that is not such JSON, is unreadable as a whole: counted and skipped. So are documents
without a character.
"""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..arrow import listed
from ..embedded import text as stdlib
from ..shards import Shards
from ..splits import NO_PART, WHOLE, for_training, in_no_part, parts_of
from ..types import DataError, Report
from ..walk import suffix_of, walk
from .records import (
    COMPRESSED,
    EMPTY,
    EXTENSIONS,
    cut,
    kind_of,
    pieces_of,
    records,
    text_or_reason,
    why_unreadable,
)
from .tars import MEMBERS, TAR, texts_of

UNPACKED = 4
"""about how many times as large a compressed text is"""


class Corpus(ABC):
    """Documents in a fixed order."""

    path: str

    @abstractmethod
    def documents(self, report: Report) -> Iterator[Iterator[str]]:
        """Each readable document as pieces of text; all are counted in `report`."""

    @abstractmethod
    def size(self) -> int:
        """Bytes of all documents, about."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents may have changed."""


def _fingerprint(files: list[Path]) -> str:
    stats = ((str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)
    return hashlib.sha256(json.dumps(list(stats)).encode()).hexdigest()


class Files(Corpus):
    """A file of text, or all of them at any depth below a folder, in sorted order."""

    def __init__(self, path: str, report: Report, purpose: str = "train", column: str = "text") -> None:
        """purpose: "train" takes the training part alone where there are parts, another all files. column: of
        lines of JSON the key, of tables the column that holds the texts.

        What is not read is named in `report`.
        """
        self.path, self.column = path, column
        found = walk(Path(path), (*EXTENSIONS, TAR), ())
        report.left_out |= found.left_out
        if Path(path).is_file() and not kind_of(path) and suffix_of(path) != TAR:
            found.files = []
        names = sorted(listed(found.root, found.files, report), key=Path)
        if not names:
            left = "".join(f"; {line}" for line in report.lines())
            raise DataError(f"data: {path}: no text in it; known: {', '.join(EXTENSIONS)}{left}")
        self.parts = {WHOLE: np.arange(len(names))}
        if Path(path).is_dir():
            self.parts = parts_of(names, path, stems=True)
        self.files = [found.root / name for name in names]
        if purpose == "train":
            report.leave_out(NO_PART, in_no_part(names, self.parts))
            self.files = [self.files[i] for i in for_training(self.parts, report)]
        self.shards = {file: Shards([file], MEMBERS) for file in self.files if suffix_of(file.name) == TAR}

    def fingerprint(self) -> str:
        return _fingerprint(self.files) + ("" if self.column == "text" else self.column)

    def size(self) -> int:
        members = sum(size for shard in self.shards.values() for *_, size in shard.members)
        files = (file for file in self.files if file not in self.shards)
        sizes = ((file.stat().st_size, file.suffix.lower() in COMPRESSED) for file in files)
        return members + sum(size * (UNPACKED if packed else 1) for size, packed in sizes)

    def documents(self, report: Report) -> Iterator[Iterator[str]]:
        for file in self.files:
            yield from self._documents(file, report)

    def _documents(self, file: Path, report: Report) -> Iterator[Iterator[str]]:
        if file in self.shards:
            for name, text, reason in texts_of(self.shards[file], self.column):
                report.total += 1
                yield from _sorted_out(name, text, reason, report)
            return
        if kind_of(file.name) == ".txt":
            report.total += 1
            reason = why_unreadable(file)
            if reason == EMPTY:
                report.skip(EMPTY, [str(file)])
            elif reason:
                report.unreadable[str(file)] = reason
            else:
                yield pieces_of(file)
            return
        for name, values in records(file, report, (self.column,)):
            yield from _sorted_out(name, *text_or_reason(values, self.column), report)


def _sorted_out(name: str, text: str, reason: str | None, report: Report) -> Iterator[Iterator[str]]:
    """A document in pieces; nothing of one that is unreadable or empty, which the report names."""
    if reason:
        report.unreadable[name] = reason
    elif not text.strip():
        report.skip(EMPTY, [name])
    else:
        yield cut(text)


class StandardLibrary(Corpus):
    """The embedded text."""

    path = "text"

    def fingerprint(self) -> str:
        return sys.version + _fingerprint([*stdlib.files(), Path(stdlib.__file__)])

    def size(self) -> int:
        return 0

    def documents(self, report: Report) -> Iterator[Iterator[str]]:
        for _, text in stdlib.documents():
            report.total += 1
            yield iter([text])


def open_corpus(path: str, report: Report, purpose: str = "train", column: str = "text") -> Corpus:
    """The documents at a path, see `Files`, or the embedded "text"."""
    return StandardLibrary() if path == "text" else Files(path, report, purpose, column)
