"""From a path to waveforms: which files there are, what is wrong with them, reading and resampling.

Indexing reads headers only. A file that cannot be used gets a reason that a user can act on; whether that
stops a run is decided by whoever asked.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile

from ..lines import lines_of, not_utf8
from ..splits import NO_PART, WHOLE, in_no_part, parts_of
from ..types import DataError, Report, Unreadable
from ..walk import suffix_of, walk

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
MIN_RATE = 4_000
"""Hz; below this a file is not speech but a mistake"""
SHORTFALL = 0.01
"""share of the frames promised by a header that may be missing (MP3 headers estimate); filled with zeros"""
OPEN_ENDED = 0x7FFF_0000
"""chunk sizes from here on are what writers to a pipe put when they do not know the size"""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    frames: int
    rate: int
    """Hz"""
    channels: int
    format: str
    truncated: str = ""
    """how the header contradicts the size of the file; empty: it does not"""

    def problem(self) -> str:
        """Why the file cannot be used; empty when it can."""
        if self.rate < MIN_RATE:
            return f"has a sample rate of {self.rate} Hz, must be at least {MIN_RATE} Hz"
        return self.truncated

    def samples(self, rate: int) -> int:
        """Length after resampling to `rate`."""
        return -(-self.frames * rate // self.rate)


def read_header(path: Path) -> Header:
    """Raises Unreadable when the file is missing or is not audio."""
    if not path.is_file():
        raise Unreadable("does not exist")
    try:
        info = soundfile.info(path, verbose=True)
    except soundfile.SoundFileError as error:
        raise Unreadable(str(getattr(error, "error_string", error))) from error
    # libsndfile opens a file that was cut off as a shorter one; only its log says so
    truncated = ""
    size = re.search(r"^ *(?:data|SSND) : (\d+) \(should be (\d+)\)", info.extra_info, re.MULTILINE)
    if size and int(size[2]) < int(size[1]) < OPEN_ENDED:
        truncated = f"truncated: {size[1]} bytes of sound announced, {size[2]} there"
    elif re.search(r"lacks an end-of-stream bit\.\s+Ogg ?: Junk", info.extra_info):
        # a missing mark alone is what some recorders leave; a started page after it is a cut
        truncated = "truncated: the Ogg stream breaks off within a page"
    return Header(info.frames, info.samplerate, info.channels, f"{info.format} {info.subtype}", truncated)


def read_wave(path: Path, expected: Header, rate: int) -> np.ndarray:
    """[expected.samples(rate)] float32 at `rate`, channels averaged. Raises Unreadable with the reason."""
    header = read_header(path)
    if problem := header.problem():
        raise Unreadable(problem)
    if (header.frames, header.rate) != (expected.frames, expected.rate):
        raise Unreadable(
            f"has {header.frames} frames at {header.rate} Hz, but the index says "
            f"{expected.frames} at {expected.rate} Hz"
        )
    try:
        wave = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    except soundfile.SoundFileError as error:
        raise Unreadable(str(getattr(error, "error_string", error))) from error
    if len(wave) < header.frames * (1 - SHORTFALL):
        raise Unreadable(f"truncated: {header.frames} frames announced, {len(wave)} there")
    if not np.isfinite(wave).all():
        raise Unreadable("holds NaN or inf")
    return resample(np.pad(wave, (0, header.frames - len(wave))), header.rate, rate)


def resample(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """[ceil(len * target / rate)] float32, through a windowed-sinc polyphase filter."""
    if rate == target:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, target)
    return resample_poly(wave, target // common, rate // common).astype(np.float32)


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
    def wave(self, index: int) -> np.ndarray:
        """[lengths[index]] float32. Raises Unreadable."""

    @abstractmethod
    def select(self, keep: np.ndarray) -> Utterances:
        """The utterances numbered `keep` [k] int64."""


class FileUtterances(Utterances):
    """One utterance per file."""

    def __init__(self, root: Path, names: list[str], headers: list[Header], rate: int) -> None:
        self.root, self.names, self.headers, self.rate = root, names, headers, rate
        self.lengths = np.array([header.samples(rate) for header in headers], dtype=np.int64)

    def wave(self, index: int) -> np.ndarray:
        return read_wave(self.root / self.names[index], self.headers[index], self.rate)

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
    """The audio files under a folder at any depth, of fairseq's manifests in it, or of one file or manifest.

    What is not read is named in `report`. DataError when there are none.
    """
    if is_manifest(path):
        root, names, headers = read_manifest(path)
        return Listing(root, names, {WHOLE: np.arange(len(names))}, headers)
    found = walk(path, SUFFIXES)
    report.left_out |= found.left_out
    if found.files:
        parts = parts_of(found.files, str(path))
        report.leave_out(NO_PART, in_no_part(found.files, parts))
        return Listing(found.root, found.files, parts)
    manifests = [path / name for name in walk(path, (".tsv",), ()).files if is_manifest(path / name)]
    if not manifests:
        left = "".join(f"; {line}" for line in report.lines())
        raise DataError(f"data: {path}: no audio files ({', '.join(s[1:] for s in SUFFIXES)}){left}")
    return of_manifests(path, manifests)


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


def mixed_channels(headers: Iterable[Header]) -> list[str]:
    """A note for a report where files have several channels."""
    several = sum(header.channels > 1 for header in headers)
    return [f"{several:,} files have several channels, which are averaged"] if several else []


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
