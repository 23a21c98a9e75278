"""Pictures in tar shards: their names, links, holes and classes."""

from __future__ import annotations

import copy
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..loader import number_classes
from ..types import DataError
from ..walk import BESIDE, is_hidden
from .eval_picture import Damaged
from .store import EXTENSIONS, MOST_BYTES, Store, decoded, opened


class TarStore(Store):
    """Uncompressed tar shards as webdataset writes them: key.jpg, and key.cls with the class.

    A key ends at the first dot of the name without its folder (webdataset's rule); a class may also have the
    whole name of its picture: IMG_2024.05.01.cls beside IMG_2024.05.01.jpg.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        self.members: list[tuple[int, str, int, int]] = []
        """shard, name, offset and size in bytes"""
        self.sparse: dict[int, tarfile.TarInfo] = {}
        """of the members whose bytes do not lie together, as `tar -S` writes them"""
        self.left_out: dict[str, list[str]] = {}
        """reason -> members that are not read"""
        self._listed: list[str | None] = []
        classes: dict[tuple[int, str], str] = {}
        for number, shard in enumerate(self.shards):
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in _files_of(tar):
                        stem, suffix = os.path.splitext(member.name)
                        if suffix.lower() in EXTENSIONS:
                            if member.issparse():
                                self.sparse[len(self.members)] = member
                            self.members.append((number, member.name, member.offset_data, member.size))
                        elif suffix.lower() == ".cls":
                            name = _contents(tar, member).decode().strip()
                            classes[number, stem] = classes[number, _key(member.name)] = name
                        elif suffix.lower() not in BESIDE:
                            reason = f"suffix {suffix.lower()} is not read" if suffix else "without a suffix"
                            self.left_out.setdefault(reason, []).append(f"{shard}:{member.name}")
            except (tarfile.TarError, OSError, UnicodeDecodeError, Damaged) as error:
                raise DataError(f"data: {shard}: not a whole, uncompressed tar file: {error}") from None
        for number, name, *_ in self.members:
            keys = ((number, os.path.splitext(name)[0]), (number, _key(name)))
            self._listed.append(next((classes[key] for key in keys if key in classes), None))
        self._open: dict[int, int] = {}

    @property
    def files(self) -> list[str]:
        """The members' names, as files below a folder have them."""
        return [os.path.normpath(name) for _, name, *_ in self.members]

    def classify(self, level: int) -> None:
        """Take the classes from the .cls files, or without any from folders within the tar.

        level: of the folders of classes, 0 for the first
        """
        listed, parts = self._listed, [name.split("/") for name in self.files]
        if not any(listed) and all(len(p) > level + 1 for p in parts) and len({p[level] for p in parts}) > 1:
            listed = [p[level] for p in parts]
        if None in listed:
            self.unlabelled = f"{self.name(listed.index(None))} has no .cls beside it"
        else:
            self.classes, self.labels = number_classes([name for name in listed if name is not None])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process has its own file descriptors

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        shard, name, *_ = self.members[index]
        return f"{self.shards[shard]}:{name}"

    def load(self, index: int) -> Image.Image:
        shard, _, offset, size = self.members[index]
        if index in self.sparse:
            with tarfile.open(self.shards[shard], "r:") as tar:
                return decoded(_contents(tar, self.sparse[index]))
        if shard not in self._open:
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return opened(self._open[shard], offset, size)


def _key(name: str) -> str:
    """Of a member: up to the first dot of its name, its folder included."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.partition(".")[0])


def _files_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, in order; a link within it is its file under another name."""
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
        if member.isfile():
            known[os.path.normpath(member.name)] = member
            if not any(map(is_hidden, os.path.normpath(member.name).split("/"))):
                yield member


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member as a whole. Damaged for one that would be unreasonably large, as files of holes can be."""
    if member.size > MOST_BYTES:
        raise Damaged(f"{member.name} announces {member.size:,} bytes, more than {MOST_BYTES:,}")
    file = tar.extractfile(member)
    assert file is not None  # of a file
    return file.read()
