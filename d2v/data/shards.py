"""Tar shards: an index of their members, each read by its number from where it lies."""

from __future__ import annotations

import copy
import json
import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from .remote import RemoteTar, shard_of
from .types import DataError, Unreadable
from .walk import BESIDE, is_hidden

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""suffixes of tars that have no access to a single member"""
MOST_BYTES = 1 << 30
"""in a member"""


class Shards:
    """The members of uncompressed tars, and what is written beside them. Picklable; nothing stays open.

    A tar within a tar is read in place, as a folder of its name: `n01440764.tar` of ImageNet's one large tar
    gives `n01440764/n01440764_18.JPEG`. A member belongs to what has its key, which ends at the first dot of
    the name without its folder (webdataset's rule); what lies beside it may also have its whole name:
    IMG_2024.05.01.cls beside IMG_2024.05.01.jpg.
    """

    def __init__(
        self, shards: Sequence[Path], kinds: Collection[str], beside: Collection[str] = (".cls",)
    ) -> None:
        """kinds: suffixes of the members that are samples. beside: of texts that are kept for them.

        DataError for what is no whole, uncompressed tar.
        """
        self.shards = [shard_of(shard) for shard in shards]
        self.members: list[tuple[int, str, int, int]] = []
        """shard, name, offset and size in bytes"""
        self.left_out: dict[str, list[str]] = {}
        """reason -> members that are not read"""
        self._sparse: dict[int, tarfile.TarInfo] = {}
        """of the members whose bytes do not lie together, as `tar -S` writes them"""
        self._beside: dict[tuple[int, str], dict[str, str]] = {}
        """shard, and name without a suffix or key -> suffix -> text"""
        for number, shard in enumerate(self.shards):
            index, sparse = _index(shard, sorted(kinds), sorted(beside))
            self._sparse |= {len(self.members) + i: member for i, member in sparse.items()}
            self.members += [(number, *member) for member in index["members"]]
            for name, suffix, text in index["beside"]:
                for key in (os.path.splitext(name)[0], _key(name)):
                    self._beside.setdefault((number, key), {})[suffix] = text
            for reason, names in index["left_out"].items():
                self.left_out.setdefault(reason, []).extend(f"{shard}:{name}" for name in names)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def files(self) -> list[str]:
        """The members' names, as files below a folder have them."""
        return [os.path.normpath(name) for _, name, *_ in self.members]

    def name(self, index: int) -> str:
        """What to call a member to a user."""
        shard, name, *_ = self.members[index]
        return f"{self.shards[shard]}:{name}"

    def beside(self, index: int, suffix: str) -> str | None:
        """The text of a suffix that belongs to a member."""
        shard, name, *_ = self.members[index]
        keys = ((shard, os.path.splitext(name)[0]), (shard, _key(name)))
        return next((self._beside[key][suffix] for key in keys if suffix in self._beside.get(key, {})), None)

    def read(self, index: int) -> bytes:
        """The bytes of a member. Raises OSError, Unreadable."""
        number, name, offset, size = self.members[index]
        shard = self.shards[number]
        if index in self._sparse:
            with _opened(shard) as tar:
                return _contents(tar, self._sparse[index])
        if size > MOST_BYTES:
            raise Unreadable(f"{size:,} bytes are too many for one sample, more than {MOST_BYTES:,}")
        if isinstance(shard, RemoteTar):
            return shard.read(offset, size)
        with open(shard, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def _opened(shard: Path | RemoteTar) -> tarfile.TarFile:
    if isinstance(shard, RemoteTar):
        return tarfile.open(fileobj=shard.open(), mode="r:")
    return tarfile.open(shard, "r:")


def _index(
    shard: Path | RemoteTar, kinds: Collection[str], beside: Collection[str]
) -> tuple[dict[str, Any], dict[int, tarfile.TarInfo]]:
    """What `Shards` keeps of a shard, JSON-able: members (name, offset, size), beside (name, suffix, text),
    left_out (reason -> names); and the sparse ones among the members. Of a shard at a URL it is kept."""
    sparse: dict[int, tarfile.TarInfo] = {}

    def make() -> dict[str, Any]:
        index: dict[str, Any] = {"members": [], "beside": [], "left_out": {}}
        try:
            with _opened(shard) as tar:
                for member in _files_of(tar):
                    suffix = os.path.splitext(member.name)[1].lower()
                    if suffix in kinds:
                        if member.issparse():
                            sparse[len(index["members"])] = member
                        index["members"].append((member.name, member.offset_data, member.size))
                    elif suffix in beside:
                        index["beside"].append((member.name, suffix, _text(shard, tar, member)))
                    elif suffix not in BESIDE:
                        reason = f"suffix {suffix} is not read" if suffix else "without a suffix"
                        index["left_out"].setdefault(reason, []).append(member.name)
        except (tarfile.TarError, OSError, RecursionError) as error:
            raise DataError(f"data: {shard}: not a whole, uncompressed tar file: {error}") from None
        if sparse and isinstance(shard, RemoteTar):
            raise DataError(f"data: {shard}: holds sparse files, which are read from local tars alone")
        return index

    index = shard.kept(json.dumps([kinds, beside]), make) if isinstance(shard, RemoteTar) else make()
    return index, sparse


def _text(shard: Path | RemoteTar, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    try:
        return _contents(tar, member).decode("utf-8-sig").strip()
    except (UnicodeDecodeError, Unreadable) as error:
        raise DataError(f"data: {shard}:{member.name}: {error}") from None


def refuse_compressed(path: str) -> None:
    """DataError for a compressed tar, with what to do."""
    if path.lower().endswith(COMPRESSED) and os.path.isfile(path):
        raise DataError(
            f"data: {path}: a compressed tar has no access to single samples; decompress it first"
        )


def suffixes_in(shard: Path) -> Iterator[str]:
    """The suffixes of a tar's members in order, in lower case, as far as it can be read."""
    try:
        with _opened(shard_of(shard)) as tar:
            for member in _files_of(tar):
                yield os.path.splitext(member.name)[1].lower()
    except (tarfile.TarError, OSError, RecursionError):
        return  # which is said when it is opened as data


def _key(name: str) -> str:
    """Of a member: up to the first dot of its name, its folder included."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.partition(".")[0])


def _files_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar and of tars within it, in order, with offsets in the outermost; a link within a tar
    is its file under another name."""
    known: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.issym() or member.islnk():
            folder = os.path.dirname(member.name) if member.issym() else ""
            target = known.get(os.path.normpath(os.path.join(folder, member.linkname)))
            if target is None:
                continue
            target = copy.copy(target)
            target.name = member.name
            member = target
        if not member.isfile():
            continue
        known[os.path.normpath(member.name)] = member
        if any(map(is_hidden, os.path.normpath(member.name).split("/"))):
            continue
        stem, suffix = os.path.splitext(member.name)
        if suffix.lower() != ".tar" or member.issparse():
            yield member
            continue
        try:
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                for file in _files_of(inner):
                    found = copy.copy(file)
                    found.name = f"{stem}/{os.path.normpath(file.name)}"
                    found.offset_data += member.offset_data
                    yield found
        except tarfile.TarError as error:
            raise tarfile.ReadError(f"{member.name}: {error}") from None


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member as a whole. Unreadable for one that would be unreasonably large, as files of holes can be."""
    if member.size > MOST_BYTES:
        raise Unreadable(f"{member.name} announces {member.size:,} bytes, more than {MOST_BYTES:,}")
    file = tar.extractfile(member)
    assert file is not None  # of a file
    return file.read()
