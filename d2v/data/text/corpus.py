"""Where text lies: .txt files (one document each), .jsonl files (one document a line, its "text"), or the
standard library. A document that is not UTF-8, or a line that is not such JSON, is unreadable as a whole:
counted and skipped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..embedded import text as stdlib
from ..splits import NO_PART, WHOLE, for_training, in_no_part, parts_of
from ..types import DataError, Report
from ..walk import suffix_of, walk

EXTENSIONS = (".txt", ".jsonl")
PIECE = 1 << 20
"""bytes after which a document is cut, at the end of a line, so that a file of any size can be read"""


class Corpus(ABC):
    """Documents in a fixed order."""

    path: str

    @abstractmethod
    def documents(self, report: Report) -> Iterator[Iterator[str]]:
        """Each readable document as pieces of text; all are counted in `report`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the documents may have changed."""


def _fingerprint(files: list[Path]) -> str:
    stats = ((str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)
    return hashlib.sha256(json.dumps(list(stats)).encode()).hexdigest()


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    return f"not UTF-8: {error.reason} at byte {offset + error.start}"


def _invalid_utf8(file: Path) -> str | None:
    """What is wrong with a file that is not UTF-8, and at which byte."""
    offset = 0
    with file.open("rb") as lines:
        for line in lines:  # a line's end is never inside a character
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return _not_utf8(error, offset)
            offset += len(line)
    return None


def _pieces(file: Path) -> Iterator[str]:
    with file.open("rb") as opened:
        while lines := opened.readlines(PIECE):
            yield b"".join(lines).decode()


def json_lines(file: Path, report: Report) -> Iterator[tuple[str, dict]]:
    """(file:line, object) of each line that is an object with a string "text"; blank lines do not count."""
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            name = f"{file}:{number}"
            if line.strip():
                report.total += 1
                try:
                    entry = json.loads(line.decode())
                    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
                        yield name, entry
                    else:
                        report.unreadable[name] = 'not an object with a string "text"'
                except UnicodeDecodeError as error:
                    report.unreadable[name] = _not_utf8(error, offset)
                except json.JSONDecodeError as error:
                    report.unreadable[name] = f"not JSON: {error}"
            offset += len(line)


class Files(Corpus):
    """A .txt or .jsonl file, or all of them at any depth below a folder, in sorted order."""

    def __init__(self, path: str, report: Report, purpose: str = "train") -> None:
        """purpose: "train" takes the training part alone where there are parts, another all files.

        What is not read is named in `report`.
        """
        self.path = path
        found = walk(Path(path), EXTENSIONS, ())
        report.left_out |= found.left_out
        if Path(path).is_file() and suffix_of(path) not in EXTENSIONS:
            found.files = []
        names = sorted(found.files, key=Path)
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

    def fingerprint(self) -> str:
        return _fingerprint(self.files)

    def documents(self, report: Report) -> Iterator[Iterator[str]]:
        for file in self.files:
            if suffix_of(file.name) == ".jsonl":
                for _, entry in json_lines(file, report):
                    yield iter([entry["text"]])
                continue
            report.total += 1
            if reason := _invalid_utf8(file):
                report.unreadable[str(file)] = reason
            else:
                yield _pieces(file)


class StandardLibrary(Corpus):
    """The embedded text."""

    path = "text"

    def fingerprint(self) -> str:
        return sys.version + _fingerprint([*stdlib.files(), Path(stdlib.__file__)])

    def documents(self, report: Report) -> Iterator[Iterator[str]]:
        for _, text in stdlib.documents():
            report.total += 1
            yield iter([text])


def open_corpus(path: str, report: Report, purpose: str = "train") -> Corpus:
    """The documents at a path, see `Files`, or the embedded "text"."""
    return StandardLibrary() if path == "text" else Files(path, report, purpose)
