"""Files of texts, read piece by piece: plain, .gz and .zst; lines of JSON, rows of tables and of .arrow.

Memory does not grow with a file: a text is handed on in pieces of at most 2 `PIECE`, and a line of JSON or a
row of a table longer than `LONGEST` is unreadable. Lines are those of `d2v.data.lines`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..arrow import SUFFIXES as TABLES
from ..arrow import batches_of
from ..lines import not_utf8, other_encoding
from ..types import DataError, Report, Unreadable

PIECE = 1 << 20
"""bytes, of a string characters, after which a text is cut: at the end of a line, in a longer line before its
last space"""
LONGEST = 1 << 27
"""bytes of a line of JSON or of a table; reading one takes some eight times as much"""

EMPTY = "empty"
"""why a text without a character is skipped"""
KINDS = (".txt", ".jsonl", ".csv", ".tsv")
COMPRESSED = (".gz", ".zst")
EXTENSIONS = (*KINDS, *TABLES, *(f"{kind}{packed}" for kind in KINDS for packed in COMPRESSED))

Record = tuple[str, Mapping[str, Any]]
"""what to call it to a user, as FILE:LINE, and its values by key or column"""


def kind_of(name: str) -> str:
    """The suffix of what a file holds when it is unpacked, in lower case; empty where it is not read."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
        return suffix if suffix in KINDS else ""
    return suffix if suffix in EXTENSIONS else ""


@contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file's bytes, unpacked, behind UTF-8's byte order mark, and how many those are.

    Raises Unreadable, also for what goes wrong in the block.
    """
    try:
        with _unpacked(file) as stream:
            begin = stream.peek(4)[:4]
            if reason := other_encoding(begin):
                raise Unreadable(reason)
            mark = codecs.BOM_UTF8 if begin.startswith(codecs.BOM_UTF8) else b""
            stream.read(len(mark))
            yield stream, len(mark)
    except (OSError, EOFError, zlib.error) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def _unpacked(file: Path) -> io.BufferedReader:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(file))
    if suffix != ".zst":
        return file.open("rb")
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ModuleNotFoundError:
        raise DataError(f'data: {file}: .zst needs backports.zstd: pip install "d2vkern[texts]"') from None
    try:
        return io.BufferedReader(_Zstd(zstd.open(file), zstd.ZstdError))
    except zstd.ZstdError as error:
        raise OSError(str(error)) from None


class _Zstd(io.RawIOBase):
    """Its errors are OSErrors, as gzip's are."""

    def __init__(self, stream: Any, error: type[Exception]) -> None:
        self.stream, self.error = stream, error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self.stream.readinto(buffer))
        except self.error as error:
            raise OSError(str(error)) from None

    def close(self) -> None:
        self.stream.close()
        super().close()


def why_unreadable(file: Path) -> str | None:
    """What is wrong with a text file, which is read whole for it: `EMPTY` if it holds nothing but space."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, empty = 0, True
    try:
        with opened(file) as (stream, offset):
            while chunk := stream.read(PIECE):
                offset += len(chunk)
                text = decoder.decode(chunk)
                empty = empty and not text.strip()
            decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        return not_utf8(error, offset - len(error.object))
    except Unreadable as error:
        return str(error)
    return EMPTY if empty else None


def pieces_of(file: Path) -> Iterator[str]:
    """A text file that `why_unreadable` has nothing against, in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held: list[str] = []
    size = 0
    with opened(file) as (stream, _):
        while chunk := stream.readline(PIECE):
            held.append(decoder.decode(chunk))
            size += len(chunk)
            if size > PIECE:
                text = "".join(held)
                place = len(text) if chunk.endswith(b"\n") else _last_space(text)
                yield text[:place]
                held, size = [text[place:]], len(text) - place
    if rest := "".join(held):
        yield rest


def cut(text: str) -> Iterator[str]:
    """A string in pieces: itself where it is no longer than two of them."""
    start = 0
    while len(text) - start > 2 * PIECE:
        piece = text[start : start + PIECE]
        piece = piece[: _last_space(piece)]
        yield piece
        start += len(piece)
    yield text[start:]


def _last_space(text: str) -> int:
    """Where to cut: before a space, where byte-level tokenizers begin a word; else, of one word, its end."""
    place = max(map(text.rfind, " \n\t"))
    return place if 2 * place > len(text) else len(text)


def records(
    file: Path, report: Report, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Record]:
    """The records of a file, each counted in `report`; what is wrong with one, or with the file, is named.

    columns: that a table must have. optional: others that are read. Values are as the file has them, of .csv
    and .tsv strings.
    """
    readers = {".jsonl": _lines_of_json, ".csv": _rows, ".tsv": _rows, **dict.fromkeys(TABLES, _columns)}
    found = readers[kind_of(file.name)](file, columns, optional)
    while True:
        try:
            name, values = next(found)
        except StopIteration:
            return
        except Unreadable as error:  # of the whole file, or of what is left of it
            report.total += 1
            report.unreadable[str(file)] = str(error)
            return
        report.total += 1
        if isinstance(values, str):
            report.unreadable[name] = values
        else:
            yield name, values


def has_column(file: Path, column: str) -> bool:
    """Whether the records of a file may have a column, by the first row of a table."""
    if kind_of(file.name) == ".jsonl":
        return True
    first = next(records(file, Report(str(file), 0), (), (column,)), None)
    return first is None or column in first[1]


def text_or_reason(record: Mapping[str, Any], column: str) -> tuple[str, str | None]:
    """A record's text, and why it cannot be read."""
    value = record.get(column)
    if not isinstance(value, str):
        has = [name for name, other in record.items() if isinstance(other, str)]
        others = f": --data.text-column may be {', '.join(has)}" if has and column not in record else ""
        return "", f'not an object with a string "{column}"{others}'
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return "", f'"{column}" holds a lone surrogate, U+{ord(value[error.start]):04X}'
    return value, None


def _lines(file: Path) -> Iterator[tuple[int, int, bytes | None]]:
    """Number, place in the file, and the line with its end; None for one that is too long."""
    with opened(file) as (stream, place):
        number = 0
        while line := stream.readline(LONGEST + 1):
            number += 1
            begin, place = place, place + len(line)
            if len(line) <= LONGEST or line.endswith(b"\n"):
                yield number, begin, line
                continue
            while not line.endswith(b"\n") and (line := stream.readline(PIECE)):
                place += len(line)
            yield number, begin, None


TOO_LONG = "a line of more than {:,} bytes"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def _lines_of_json(
    file: Path, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    for number, place, line in _lines(file):
        name = f"{file}:{number}"
        if line is None:
            yield name, TOO_LONG.format(LONGEST)
        elif line.strip():
            try:
                entry = _JSON.decode(line.decode())
                yield name, entry if isinstance(entry, dict) else "not an object of JSON"
            except UnicodeDecodeError as error:
                yield name, not_utf8(error, place)
            except RecursionError:
                yield name, "not JSON that can be read: brackets in too many brackets"
            except json.JSONDecodeError as error:
                yield name, f"not JSON: {error.msg} at character {error.pos + 1}"
            except ValueError as error:  # of a key that stands twice, or of a number with thousands of digits
                yield name, f"not JSON that can be read: {str(error).partition(';')[0]}"


def _rows(
    file: Path, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Rows of a table with a header: commas and quotes in .csv, tabs and no quotes in .tsv."""
    lines = _Decoded(file)
    parse = _split if kind_of(file.name) == ".tsv" else _parsed
    header: list[str] = []
    for first, last, row in parse(lines):
        name = f"{file}:{first}"
        reason = lines.reason(first, last) or (row if isinstance(row, str) else None)
        if reason and not header:
            raise Unreadable(f"its header cannot be read: {reason}")
        if reason or isinstance(row, str):
            yield name, str(reason)
        elif row and not header:
            header = [column.strip() for column in row]
            check_columns(header, columns)
        elif len(row) not in (0, len(header)):
            yield name, f"{len(row)} columns, the header has {len(header)}"
        elif row:
            yield name, dict(zip(header, row, strict=True))
    if not header:
        raise Unreadable("empty: a table begins with the names of its columns")


def split_rows(file: Path, report: Report) -> Iterator[tuple[str, list[str]]]:
    """FILE:LINE and the fields between tabs of each line, where quotes mean nothing, in GLUE's files.

    What is unreadable is counted in `report`, what is read is not. DataError for the whole file.
    """
    lines = _Decoded(file)
    try:
        for number, _, row in _split(lines):
            if reason := lines.reason(number, number):
                report.total += 1
                report.unreadable[f"{file}:{number}"] = reason
            elif row:
                yield f"{file}:{number}", row
    except Unreadable as error:
        raise DataError(f"data: {file}: {error}") from None


class _Decoded:
    """The lines of a file as strings with their ends, empty ones for those that cannot be read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._bad: dict[int, str] = {}

    def __iter__(self) -> Iterator[str]:
        for number, place, line in _lines(self.file):
            try:
                text = "\n" if line is None else line.decode()
                if line is None:
                    self._bad[number] = TOO_LONG.format(LONGEST)
            except UnicodeDecodeError as error:
                self._bad[number], text = not_utf8(error, place), "\n"
            yield text

    def reason(self, first: int, last: int) -> str | None:
        """What is wrong with one of these lines; it is forgotten."""
        return next((self._bad.pop(n) for n in range(first, last + 1) if n in self._bad), None)


def check_columns(header: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise Unreadable where a table lacks a column that is wanted, or has it twice."""
    for column in wanted:
        if (times := list(header).count(column)) != 1:
            what = f"has no column {column!r}" if not times else f"has {times} columns {column!r}"
            raise Unreadable(f"{what}, its columns: {', '.join(header)} (--data.text-column chooses one)")


def _split(lines: Iterable[str]) -> Iterator[tuple[int, int, list[str]]]:
    """First and last line of each row, and its fields."""
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        yield number, number, line.split("\t") if line else []


def _parsed(lines: Iterable[str]) -> Iterator[tuple[int, int, list[str] | str]]:
    """As `_split`, or what is wrong with a row. A field in quotes may hold line ends."""
    csv.field_size_limit(max(LONGEST, csv.field_size_limit()))
    reader = csv.reader(lines, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, reader.line_num, f"not a row of .csv: {error}"
            continue
        yield first, reader.line_num, row


def _columns(
    file: Path, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Rows of .parquet and .arrow."""
    number = 0
    for batch in batches_of(file, lambda names: _present(names, columns, optional)):
        for values in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", values


def _present(names: Sequence[str], columns: Sequence[str], optional: Sequence[str]) -> list[str]:
    check_columns(names, columns)
    return [name for name in names if name in (*columns, *optional)]
