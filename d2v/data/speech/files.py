"""From a path to waveforms: which files there are and what is wrong with them; `reading` reads one of them.

Indexing reads headers, and decodes the files whose headers do not tell their length. A file that cannot be
used gets a reason that a user can act on; whether that stops a run is decided by whoever asked.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ...config.run import Channels
from ..lines import lines_of, not_utf8
from ..splits import NO_PART, WHOLE, in_no_part, parts_of
from ..types import DataError, Report, Unreadable
from ..walk import suffix_of, walk
from .reading import Header, read_header, read_wave
from .tables import read_tables

SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".aif", ".aiff", ".aifc", ".au", ".snd",
    ".caf", ".w64", ".rf64", ".sph", ".nist", ".wv1", ".wv2", ".m4a", ".m4b", ".aac", ".ac3", ".webm",
    ".weba", ".mka", ".wma", ".amr", ".awb", ".3gp", ".3ga", ".gsm", ".g722", ".tta", ".wv",
)  # fmt: skip
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

    def __init__(self, root: Path, names: list[str], headers: list[Header], rate: int) -> None:
        self.root, self.names, self.headers, self.rate = root, names, headers, rate
        self.lengths = np.array([header.samples(rate) for header in headers], dtype=np.int64)

    def wave(self, index: int, channels: Channels = "mix") -> np.ndarray:
        return read_wave(self.root / self.names[index], self.headers[index], self.rate, channels)

    def select(self, keep: np.ndarray) -> FileUtterances:
        names = [self.names[i] for i in keep]
        return FileUtterances(self.root, names, [self.headers[i] for i in keep], self.rate)


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

    def select(self, keep: np.ndarray) -> Listing:
        """The files numbered `keep` [k], all of them one part."""
        names = [self.names[i] for i in keep.tolist()]
        headers = None if self.headers is None else [self.headers[i] for i in keep.tolist()]
        return Listing(self.root, names, {WHOLE: np.arange(len(keep))}, headers)

    def read_headers(self) -> list[Header | str]:
        """Of each file its header, or the reason why it has none."""
        if self.headers is None:
            self.headers = in_threads(lambda name: header_or_reason(self.root / name), self.names)
        return self.headers


def list_audio(path: Path, report: Report) -> Listing:
    """The audio files under a folder at any depth, of tables or fairseq's manifests in it, or of one file or
    manifest.

    What is not read is named in `report`. DataError when there are none.
    """
    if is_manifest(path):
        root, names, headers = read_manifest(path)
        return Listing(root, names, {WHOLE: np.arange(len(names))}, headers)
    found = walk(path, SUFFIXES)
    report.left_out |= found.left_out
    if path.is_dir() and (tables := read_tables(path)):
        return of_tables(path, tables, found.files, report)
    if found.files:
        parts = parts_of(found.files, str(path))
        report.leave_out(NO_PART, in_no_part(found.files, parts))
        return Listing(found.root, found.files, parts)
    manifests = [path / name for name in walk(path, (".tsv",), ()).files if is_manifest(path / name)]
    if not manifests:
        left = "".join(f"; {line}" for line in report.lines())
        raise DataError(f"data: {path}: no audio files ({', '.join(s[1:] for s in SUFFIXES)}){left}")
    return of_manifests(path, manifests)


def of_tables(path: Path, tables: Mapping[str, Collection[str]], files: list[str], report: Report) -> Listing:
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
    report.leave_out("named in no table", [file for file in files if file not in names])
    return Listing(path, list(names), numbers)


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
