"""Data sets at URLs, through fsspec: a folder in the cache stands for one, and everything else reads that.

Tables and texts are fetched into it whole, once. Of a tar shard a stand-in lies there that names its URL:
`shards` indexes the shard by its headers and reads each member by the range of its bytes, so nothing is
fetched but what is trained on, and a run resumes anywhere. What a URL holds is listed each time it is opened;
what has changed in size or version is fetched anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config.atomic import write_json, write_text
from .cache import default_cache
from .types import DataError, Unreachable
from .walk import suffix_of

MARK = "d2v: a tar at "
"""what a stand-in begins with"""
WHOLE = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".npz", ".jsonl.gz", ".jsonl.zst",
         ".csv.gz", ".csv.zst", ".tsv.gz", ".tsv.zst", ".txt.gz", ".txt.zst")  # fmt: skip
"""suffixes of what is fetched"""
VERSION = ("ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "created")
"""what file systems call the version of a file"""
HEADERS = 1 << 14
"""bytes fetched at a time while a shard is indexed"""
TRIES, WAIT = 4, 1.0
"""of a request that fails, and seconds before the second; each further wait is twice as long"""
_BRACES = re.compile(r"\{([^{}]*)\}")
T = TypeVar("T")


def is_url(path: str) -> bool:
    """Whether a path names a protocol, such as s3://bucket/folder."""
    return "://" in path


def at_hand(path: str) -> str:
    """The folder, or file, that stands for a URL; a path as it is.

    A URL is a file, a folder, or has `*` or braces: `https://host/train-{000..127}.tar`; HTTP has no folders.
    Raises DataError where nothing is there, or nothing that is read from URLs.
    """
    if not is_url(path):
        return path
    urls = {url: about for one in braces(path) for url, about in _listed(one)}
    root = _common([*urls])
    home = default_cache() / "urls" / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    names = {url: url[len(root) :] for url in urls}
    read = {url: name for url, name in names.items() if suffix_of(name) in (*WHOLE, ".tar")}
    if not read:
        held = ", ".join(sorted({suffix_of(name) or "no suffix" for name in names.values()})[:5])
        raise DataError(
            f"data: {path}: from URLs .tar shards, {', '.join(WHOLE[:2])} and texts are read, it holds "
            f"{held}: pack the files into tars, or copy them"
        )
    for url, name in read.items():
        _stand_in(url, urls[url], home / name)
    for file in _files(home):
        if str(file.relative_to(home)) not in read.values():
            file.unlink()
    alone = suffix_of(path) in (*WHOLE, ".tar") and len(read) == 1
    return str(home / next(iter(read.values())) if alone else home)


def braces(pattern: str) -> list[str]:
    """What a pattern with `{000..127}` and `{a,b}` stands for, as in a shell."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, dots, last = found[1].partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        choices = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    filled = (pattern[: found.start()] + choice + pattern[found.end() :] for choice in choices)
    return list(itertools.chain.from_iterable(map(braces, filled)))


@dataclass(frozen=True)
class RemoteTar:
    """A shard at a URL. Picklable."""

    url: str
    place: Path
    """of its stand-in"""

    def __str__(self) -> str:
        return self.url

    def open(self) -> Any:
        """The shard as a file whose headers are fetched as they are needed. OSError."""
        fs, path = _file_system(self.url)
        options = {"block_size": HEADERS, "cache_type": "readahead"}
        return _tried(self.url, lambda: fs.open(path, "rb", **options))

    def read(self, offset: int, size: int) -> bytes:
        """Some of its bytes. Unreachable when they cannot be had, which ends a run: a network that is down
        must not be taken for samples that are unreadable."""
        fs, path = _file_system(self.url)
        data: bytes = _tried(self.url, lambda: fs.cat_file(path, start=offset, end=offset + size))
        if len(data) != size:
            raise Unreachable(
                f"data: {self.url}: {size:,} bytes from {offset:,} on wanted, {len(data):,} came"
            )
        return data

    def kept(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, JSON-able, from the last time for the same version of the shard."""
        about = json.dumps([self.place.read_text("utf-8"), key])
        file = self.place.with_name(f".{self.place.name}.{hashlib.sha256(about.encode()).hexdigest()[:16]}")
        if not file.is_file():
            write_json(file, make())
        return json.loads(file.read_text("utf-8"))


def shard_of(file: Path) -> Path | RemoteTar:
    """A tar, or that which a stand-in names."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(MARK))
    except OSError:
        return file  # which is said when it is opened
    if begin != MARK.encode():
        return file
    return RemoteTar(file.read_text("utf-8").split("\n")[0][len(MARK) :], file)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec  # comes with torch

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"data: {url}: {error}") from None
    return found


def _tried(url: str, request: Callable[[], T]) -> T:
    """What a request returns, tried some times. Unreachable: it never did, with the last reason."""
    for attempt in range(TRIES):
        try:
            return request()
        except FileNotFoundError:
            raise Unreachable(f"data: {url} does not exist") from None
        except Exception as error:  # each file system has errors of its own
            reason = f"{type(error).__name__}: {error}"
            if attempt < TRIES - 1:
                time.sleep(WAIT * 2**attempt)
    raise Unreachable(f"data: {url}: {reason}")


def _listed(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files at a URL without braces, and what the file system says of each."""
    fs, path = _file_system(url)
    if "*" in path:
        found = _tried(url, lambda: fs.glob(path, detail=True))
    elif suffix_of(path) in (*WHOLE, ".tar"):
        found = {path: _tried(url, lambda: fs.info(path))}
    else:
        found = _tried(url, lambda: fs.find(path, detail=True))
    if not found:
        raise DataError(f"data: {url} does not exist, or holds nothing")
    return ((fs.unstrip_protocol(one), found[one]) for one in sorted(found))


def _common(urls: list[str]) -> str:
    """What all URLs begin with, up to a slash."""
    shared = os.path.commonprefix(urls)
    return shared[: shared.rfind("/") + 1]


def _files(home: Path) -> list[Path]:
    """Those that stand for something; what begins with a dot is beside them, or being made."""
    found = (file for file in home.rglob("*") if file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(home).parts)]


def _stand_in(url: str, about: dict[str, Any], place: Path) -> None:
    """Make `place` stand for a URL: a copy, or of a tar a note; nothing where it does so already."""
    fs, path = _file_system(url)
    version = json.dumps([url, about.get("size"), [str(about[key]) for key in VERSION if key in about]])
    noted = place.with_name(f".{place.name}.version")
    if place.is_file() and noted.is_file() and noted.read_text("utf-8") == version:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    noted.unlink(missing_ok=True)
    if suffix_of(place.name) == ".tar":
        write_text(place, f"{MARK}{url}\n{version}\n")
    else:
        with tempfile.TemporaryDirectory(
            dir=place.parent, prefix="."
        ) as own:  # another process may fetch it too
            making = os.path.join(own, place.name)
            _tried(url, lambda: fs.get_file(path, making))
            os.replace(making, place)
    write_text(noted, version)
