"""Tar shards: an index of their members, each read by its number from where it lies."""

from __future__ import annotations

import copy
import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

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
        self.shards = list(shards)
        self.members: list[tuple[int, str, int, int]] = []
        """shard, name, offset and size in bytes"""
        self.left_out: dict[str, list[str]] = {}
        """reason -> members that are not read"""
        self._sparse: dict[int, tarfile.TarInfo] = {}
        """of the members whose bytes do not lie together, as `tar -S` writes them"""
        self._beside: dict[tuple[int, str], dict[str, str]] = {}
        """shard, and name without a suffix or key -> suffix -> text"""
        for number, shard in enumerate(self.shards):
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in _files_of(tar):
                        self._add(number, member, tar, kinds, beside)
            except (tarfile.TarError, OSError, RecursionError) as error:
                raise DataError(f"data: {shard}: not a whole, uncompressed tar file: {error}") from None

    def _add(
        self, number: int, member: tarfile.TarInfo, tar: tarfile.TarFile, kinds: Collection[str],
        beside: Collection[str],
    ) -> None:  # fmt: skip
        stem, suffix = os.path.splitext(member.name)
        suffix = suffix.lower()
        where = f"{self.shards[number]}:{member.name}"
        if suffix in kinds:
            if member.issparse():
                self._sparse[len(self.members)] = member
            self.members.append((number, member.name, member.offset_data, member.size))
        elif suffix in beside:
            try:
                text = _contents(tar, member).decode("utf-8-sig").strip()
            except (UnicodeDecodeError, Unreadable) as error:
                raise DataError(f"data: {where}: {error}") from None
            for name in (stem, _key(member.name)):
                self._beside.setdefault((number, name), {})[suffix] = text
        elif suffix not in BESIDE:
            reason = f"suffix {suffix} is not read" if suffix else "without a suffix"
            self.left_out.setdefault(reason, []).append(where)

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
        shard, name, offset, size = self.members[index]
        if index in self._sparse:
            with tarfile.open(self.shards[shard], "r:") as tar:
                return _contents(tar, self._sparse[index])
        if size > MOST_BYTES:
            raise Unreadable(f"{size:,} bytes are too many for one sample, more than {MOST_BYTES:,}")
        with open(self.shards[shard], "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def refuse_compressed(path: str) -> None:
    """DataError for a compressed tar, with what to do."""
    if path.lower().endswith(COMPRESSED) and os.path.isfile(path):
        raise DataError(
            f"data: {path}: a compressed tar has no access to single samples; decompress it first"
        )


def suffixes_in(shard: Path) -> Iterator[str]:
    """The suffixes of a tar's members in order, in lower case, as far as it can be read."""
    try:
        with tarfile.open(shard, "r:") as tar:
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
