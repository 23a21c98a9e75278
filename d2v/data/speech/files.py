"""From a path to waveforms: which files there are and what is wrong with them; `reading` reads one of them.

Indexing reads headers, and decodes the files whose headers do not tell their length. A file that cannot be
used gets a reason that a user can act on; whether that stops a run is decided by whoever asked.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from ...config.run import Channels, DataConfig
from ..arrow import SUFFIXES as ROWS
from ..arrow import Rows as ArrowRows
from ..arrow import kind_of_rows, listed
from ..lines import lines_of, not_utf8
from ..splits import NO_PART, WHOLE, around, in_no_part, parts_of
from ..tables import CLASSES, TEXTS, columns_of, read_described, tables_in
from ..tables import SUFFIXES as TABLES
from ..types import DataError, Report, Unreadable
from ..walk import suffix_of, walk
from .reading import Header, piece_of, read_header, read_wave
from .tables import Row, Rows, read_tables
from .tars import TarSounds, sounds_of_tars

SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".aif", ".aiff", ".aifc", ".au", ".snd",
    ".caf", ".w64", ".rf64", ".sph", ".nist", ".wv1", ".wv2", ".m4a", ".m4b", ".aac", ".ac3", ".webm",
    ".weba", ".mka", ".wma", ".amr", ".awb", ".3gp", ".3ga", ".gsm", ".g722", ".tta", ".wv",
)  # fmt: skip
MEMORY = Path("/dev/shm")
"""where a row's sound is a file for a moment, where there is such a place"""
Wants = Literal["parts", "classes", "texts"]
T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`function` of each item, in order; soundfile releases the interpreter while it reads."""
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(function, items))


class Utterances(ABC):
    """A list of waveforms at one sample rate. Picklable."""

    names: list[str]
    lengths: np.ndarray
    """[n] int64, samples"""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def wave(self, index: int, channels: Channels = "mix") -> np.ndarray:
        """[lengths[index]] float32; of several channels what data.channels says. Raises Unreadable."""

    @abstractmethod
    def select(self, keep: np.ndarray) -> Utterances:
        """The utterances numbered `keep` [k] int64."""


class FileUtterances(Utterances):
    """One utterance per file."""

    def __init__(
        self,
        root: Path,
        names: list[str],
        headers: list[Header],
        rate: int,
        rows: RowSounds | TarSounds | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """files: of the names that are not their files' own."""
        self.root, self.names, self.headers, self.rate, self.rows = root, names, headers, rate, rows
        self.files = files or {}
        self.lengths = np.array([header.samples(rate) for header in headers], dtype=np.int64)

    def wave(self, index: int, channels: Channels = "mix") -> np.ndarray:
        name = self.names[index]
        with sound_file(self.root, self.files.get(name, name), self.rows) as path:
            return read_wave(path, self.headers[index], self.rate, channels)

    def select(self, keep: np.ndarray) -> FileUtterances:
        names = [self.names[i] for i in keep]
        headers = [self.headers[i] for i in keep]
        return FileUtterances(self.root, names, headers, self.rate, self.rows, self.files)


@dataclass
class Listing:
    """The audio files of a data set, and how they are divided."""

    root: Path
    names: list[str]
    """relative to root, in order of their parts' files"""
    parts: dict[str, np.ndarray]
    """the numbers of the files of each part, as `splits.parts_of` has them"""
    headers: list[Header | str] | None = None
    """of manifests, which hold the lengths"""
    rows: RowSounds | TarSounds | None = None
    """where the names are rows of tables, or members of tars"""
    pieces: dict[str, Row] | None = None
    """of tables: what the names stand for, where that is not a whole file"""
    described: dict[str, str] | None = None
    """what tables say of the files, as `list_audio` was asked"""
    level: int = 0
    """of the folders of classes"""

    def select(self, keep: np.ndarray) -> Listing:
        """The files numbered `keep` [k], all of them one part."""
        names = [self.names[i] for i in keep.tolist()]
        headers = None if self.headers is None else [self.headers[i] for i in keep.tolist()]
        return replace(self, names=names, parts={WHOLE: np.arange(len(keep))}, headers=headers)

    def utterances(self, names: list[str], headers: list[Header], rate: int) -> FileUtterances:
        """Some of the files, with their headers."""
        files = {name: row.file for name, row in (self.pieces or {}).items()}
        return FileUtterances(self.root, names, headers, rate, self.rows, files)

    def read_headers(self) -> list[Header | str]:
        """Of each file its header, or the reason why it has none."""
        if self.headers is None:
            pieces = self.pieces or {}
            files = [pieces[name].file if name in pieces else name for name in self.names]
            once = list(dict.fromkeys(files))
            found = dict(zip(once, in_threads(self._header, once), strict=True))
            self.headers = [self._piece(n, found[file]) for n, file in zip(self.names, files, strict=True)]
        return self.headers

    def _piece(self, name: str, header: Header | str) -> Header | str:
        """Of a name, given the header of its file."""
        piece = self.pieces[name].piece if self.pieces and name in self.pieces else None
        if piece is None or isinstance(header, str) or header.problem():
            return header
        try:
            return piece_of(header, *piece)
        except Unreadable as error:
            return str(error)

    def _header(self, name: str) -> Header | str:
        try:
            with sound_file(self.root, name, self.rows) as path:
                return read_header(path)
        except Unreadable as error:
            return str(error)


@contextmanager
def sound_file(root: Path, name: str, rows: RowSounds | TarSounds | None) -> Iterator[Path]:
    """The file of a sound; of a row's bytes one in memory, for as long as it is needed. Unreadable."""
    value = root / name if rows is None else rows.encoded(name)
    if isinstance(value, Path):
        yield value
        return
    if not value:
        raise Unreadable("an empty row")
    with tempfile.NamedTemporaryFile(dir=MEMORY if MEMORY.is_dir() else None, suffix=".sound") as file:
        file.write(value)
        file.flush()
        yield Path(file.name)


class RowSounds:
    """The sounds in rows of Hugging Face data sets, by name."""

    def __init__(self, tables: Sequence[ArrowRows]) -> None:
        self.tables = list(tables)
        self.places = {
            table.name(row): (number, row) for number, table in enumerate(tables) for row in range(len(table))
        }

    def encoded(self, name: str) -> bytes | Path | None:
        """See `Rows.encoded`."""
        table, row = self.places[name]
        return self.tables[table].encoded(row)

    def texts(self) -> dict[str, str]:
        """What is said in the rows that have a transcript."""
        found = zip(self.places, (text for table in self.tables for text in table.texts()), strict=True)
        return {name: text for name, text in found if isinstance(text, str)}

    def classes(self) -> tuple[dict[str, str], str]:
        """The class of every row that has one, and why others have none."""
        found: dict[str, str] = {}
        without = ""
        names = iter(self.places)
        for table in self.tables:
            labels = table.labels()
            without = without or ("" if labels is not None else table.unlabelled)
            own = [next(names) for _ in range(len(table))]
            found |= {} if labels is None else dict(zip(own, labels, strict=True))
        return found, without


def list_audio(path: Path, report: Report, data: DataConfig, wants: Wants = "parts") -> Listing:
    """The audio files under a folder at any depth, of tables or fairseq's manifests in it, or of one file or
    manifest; or the rows of Hugging Face data sets; or, without any other, the members of tars.

    wants: what tables are asked of the files, in `described` of what is returned. What is not read is named
    in `report`. DataError when there are none.
    """
    if rows := _row_files(path):
        return _of_rows(path, rows, report, data.label_column)
    if is_manifest(path):
        root, names, headers = read_manifest(path)
        return Listing(root, names, {WHOLE: np.arange(len(names))}, headers)
    found = walk(path, {*SUFFIXES, *TABLES, ".tar"})
    report.left_out |= found.left_out
    sounds = [file for file in found.files if suffix_of(file) in SUFFIXES]
    tars = [file for file in found.files if suffix_of(file) == ".tar"]
    if path.is_dir() and (tables := read_tables(path)):
        report.leave_out("tar files beside tables", tars)
        return of_tables(path, tables, sounds, report)
    if sounds:
        report.leave_out("tar files beside sounds", tars)
        beside = [file for file in found.files if suffix_of(file) in TABLES] if path.is_dir() else []
        return _of_files(found.root, sounds, beside, report, data, wants)
    manifests = [path / name for name in walk(path, (".tsv",), ()).files if is_manifest(path / name)]
    if not manifests and tars:
        members, parts = sounds_of_tars(found.root, tars, SUFFIXES, report)
        if members.places:
            return Listing(found.root, list(members.places), parts, rows=members)
    if not manifests:
        left = "".join(f"; {line}" for line in report.lines())
        raise DataError(f"data: {path}: no audio files ({', '.join(s[1:] for s in SUFFIXES)}){left}")
    return of_manifests(path, manifests)


def _of_files(
    root: Path, sounds: list[str], beside: list[str], report: Report, data: DataConfig, wants: Wants
) -> Listing:
    """Sounds in folders, divided by these, by lists, or by the tables beside them."""
    if parts := _listed(root, sounds):
        level = around(sounds)
    else:
        parts = parts_of(sounds, str(root))
        level = around(sounds) + int(WHOLE not in parts)
    classes = {Path(sound).parts[level : level + 1] for sound in sounds if len(Path(sound).parts) > level + 1}
    wanted: tuple[str, ...] = ()
    if wants != "texts":
        wanted += columns_of(data.label_column, DataConfig.label_column, CLASSES)
    if wants != "classes":
        wanted += columns_of(data.text_column, DataConfig.text_column, TEXTS)
    asked = wants == "texts" or (wants == "classes" and (data.audio_column or len(wanted) == 1))
    described = None
    if asked or len(classes) < 2:
        tables = tables_in(root, beside, data.audio_column)
        if wants == "texts" and not tables and (bare := [n for n in beside if Path(n).stem == "metadata"]):
            raise DataError(
                f"data: {root / bare[0]}: a table without a column of file names, such as file_name"
            )
        described = read_described(root, sounds, tables, wanted, report)
    if described is not None and described.parts:
        parts = described.parts
    report.leave_out(NO_PART, in_no_part(sounds, parts))
    of = None if described is None else described.of
    return Listing(root, sounds, parts, described=of, level=level)


def _listed(root: Path, sounds: Sequence[str]) -> dict[str, np.ndarray]:
    """The parts that Speech Commands' lists of files make; empty without any."""
    folder = Path(*Path(sounds[0]).parts[: around(sounds)])
    held: dict[str, set[str]] = {}
    for part in ("validation", "testing"):
        file = root / folder / f"{part}_list.txt"
        try:
            if file.is_file():
                held[part] = {str(folder / line) for line in lines_of(file.read_bytes())}
        except UnicodeDecodeError as error:
            raise DataError(f"data: {file}: {not_utf8(error)}") from None
    places = [next((part for part, files in held.items() if sound in files), "train") for sound in sounds]
    found = parts_of([f"{place}/file" for place in places], str(root)) if held else {}
    return found if len(found) > 1 else {}


def _row_files(path: Path) -> list[str]:
    """The tables of rows with sounds."""
    if path.is_dir():
        files = walk(path, ROWS, ()).files
    else:
        files = [path.name] if suffix_of(path.name) in ROWS else []
    root = path if path.is_dir() else path.parent
    return files if files and kind_of_rows(root / files[0]) == "audio" else []


def _of_rows(path: Path, files: list[str], report: Report, label: str) -> Listing:
    root = path if path.is_dir() else path.parent
    files = listed(root, files, report)
    parts = parts_of(files, str(path), stems=True) if path.is_dir() else {WHOLE: np.arange(len(files))}
    report.leave_out(NO_PART, in_no_part(files, parts))
    tables = [ArrowRows([root / files[i] for i in some.tolist()], "Audio", label, TEXTS)
              for some in parts.values()]  # fmt: skip
    ends = np.cumsum([0, *map(len, tables)])
    numbers = {part: np.arange(ends[i], ends[i + 1]) for i, part in enumerate(parts)}
    rows = RowSounds(tables)
    return Listing(root, list(rows.places), numbers, rows=rows)


def of_tables(path: Path, tables: Mapping[str, Rows], files: list[str], report: Report) -> Listing:
    """The sounds that tables name, divided by the names of the tables; other files are named in `report`."""
    parts = parts_of(list(tables), str(path), stems=True)
    report.leave_out(NO_PART, in_no_part(list(tables), parts))
    rows, names, numbers = list(tables.values()), dict[str, None](), {}
    for part, some in parts.items():
        own = dict.fromkeys(name for table in some.tolist() for name in rows[table])
        if twice := next((name for name in own if name in names), None):
            raise DataError(f"data: {path}: {twice} is in {part} and in another part")
        numbers[part] = np.arange(len(names), len(names) + len(own))
        names |= own
    every = {name: row for table in rows for name, row in table.items()}
    named = {row.file for row in every.values()}
    report.leave_out("named in no table", [file for file in files if file not in named])
    pieces = {name: row for name, row in every.items() if row.piece is not None}
    return Listing(path, list(names), numbers, pieces=pieces)


def of_manifests(path: Path, manifests: list[Path]) -> Listing:
    """The files that the manifests in a folder name, divided by the names of the manifests."""
    names: list[str] = []
    headers: list[Header | str] = []
    numbers: dict[str, np.ndarray] = {}
    by_name = parts_of([str(file.relative_to(path)) for file in manifests], str(path), stems=True)
    for part, some in by_name.items():
        first = len(names)
        for manifest in some.tolist():
            root, files, found = read_manifest(manifests[manifest])
            names += [str((root / file).absolute()) for file in files]
            headers += found
        numbers[part] = np.arange(first, len(names))
    return Listing(Path("/"), names, numbers, headers)


def is_manifest(path: Path) -> bool:
    """Whether a file is the original's manifest: a .tsv whose first line is the folder of the audio files."""
    if suffix_of(path.name) != ".tsv" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\t" not in file.readline(1 << 16)


HANDLING: dict[Channels, str] = {
    "mix": "are averaged (data.channels)",
    "first": "are read by the first alone (data.channels)",
    "refuse": "are refused (data.channels)",
}


def told_of(headers: Iterable[Header], channels: Channels) -> list[str]:
    """Notes for a report: files of several channels, files that were decoded to know their length."""
    headers, notes = list(headers), []
    if several := sum(header.channels > 1 for header in headers):
        notes.append(f"{several:,} files have several channels, which {HANDLING[channels]}")
    if measured := sum(header.measured for header in headers):
        notes.append(f"{measured:,} files do not tell their length and were decoded to measure it")
    return notes


def header_or_reason(path: Path) -> Header | str:
    """The header of a file, usable or not, or why it cannot be read."""
    try:
        return read_header(path)
    except Unreadable as error:
        return str(error)


def read_manifest(path: Path) -> tuple[Path, list[str], list[Header | str]]:
    """The original's manifest: the root folder, then lines of `path<TAB>frames`.

    Only one header is read, for the sample rate that a manifest does not hold; a file that turns out to
    differ in rate or length is unreadable when its turn comes. A relative root is taken from the
    manifest's folder.
    """
    try:
        lines = lines_of(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"data: {path}: {not_utf8(error)}") from error
    root = path.parent / lines[0].strip() if lines else path
    if not root.is_dir():
        raise DataError(
            f"data: {path}, line 1: must be the folder of the audio files, got {''.join(lines[:1])!r}"
        )
    names, frames = [], []
    for number, line in enumerate(lines[1:], start=2):
        name, tab, count = line.partition("\t")
        if not (tab and count.strip().isdecimal()):
            raise DataError(f"data: {path}, line {number}: must be path<TAB>frames, got {line!r}")
        names.append(name)
        frames.append(int(count))
    reasons: list[Header | str] = []
    for name in names:
        first = header_or_reason(root / name)
        if isinstance(first, Header) and not first.problem():
            return root, names, [Header(n, first.rate, 1, first.format) for n in frames]
        reasons.append(first)
    if not names:
        raise DataError(f"data: {path}: no audio files")
    return root, names, reasons
