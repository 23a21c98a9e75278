"""Where pictures lie: a folder of files, tar shards, or arrays, each with random access by number.

A store hands out undecoded work: `load` opens picture i as a Pillow image (decoded when its pixels are
touched) or as an array, and knows names and labels. What is done with the pixels is in `pipeline`.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..loader import number_classes
from ..types import DataError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"))


class Store(ABC):
    """Pictures by number; `labels` [n] int64 with names in `classes`, or None."""

    labels: np.ndarray | None = None
    classes: Sequence[str] = ()
    unlabelled: str = "no labels"
    """why there are no labels, when there are none"""
    floating: bool = False
    """whether pixels are float32 of any range, instead of uint8"""

    @abstractmethod
    def __len__(self) -> int:
        """Pictures."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call picture `index` to a user."""

    @abstractmethod
    def load(self, index: int) -> Image.Image | np.ndarray:
        """A Pillow image, or an array [h,w,C] uint8 or float32."""


class FolderStore(Store):
    """Files at any depth below a folder, in sorted order; the first folder below it is the class."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = sorted(
            os.path.relpath(os.path.join(folder, file), root)
            for folder, _, files in os.walk(root, followlinks=True)
            for file in files
            if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith(".")
        )
        parts = [Path(file).parts for file in self.files]
        if parts and all(len(p) > 1 for p in parts):
            self.classes, self.labels = number_classes([p[0] for p in parts])
        else:
            self.unlabelled = "pictures lie directly in the folder, not in one subfolder per class"

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def load(self, index: int) -> Image.Image:
        with open(self.name(index), "rb") as file:
            return Image.open(io.BytesIO(file.read()))


class TarStore(Store):
    """Uncompressed tar shards as webdataset writes them: key.jpg, and key.cls with the class."""

    def __init__(self, root: Path) -> None:
        self.shards = [root] if root.is_file() else sorted(root.glob("*.tar"))
        self.members: list[tuple[int, str, int, int]] = []
        """shard, name, offset and size in bytes"""
        keys, classes = [], {}
        for number, shard in enumerate(self.shards):
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        folder, file = os.path.split(member.name)
                        key, _, extension = file.partition(".")
                        place = (number, folder, key)
                        if member.isfile() and f".{extension}".lower() in EXTENSIONS:
                            self.members.append((number, member.name, member.offset_data, member.size))
                            keys.append(place)
                        elif member.isfile() and extension == "cls":
                            classes[place] = tar.extractfile(member).read().decode().strip()  # type: ignore[union-attr]
            except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
                raise DataError(f"data: {shard}: not a whole, uncompressed tar file: {error}") from None
        unlabelled = [i for i, key in enumerate(keys) if key not in classes]
        if unlabelled:
            self.unlabelled = f"{self.name(unlabelled[0])} has no .cls beside it"
        else:
            self.classes, self.labels = number_classes([classes[key] for key in keys])
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process has its own file descriptors

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        shard, name, *_ = self.members[index]
        return f"{self.shards[shard]}:{name}"

    def load(self, index: int) -> Image.Image:
        shard, _, offset, size = self.members[index]
        if shard not in self._open:
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return Image.open(io.BytesIO(os.pread(self._open[shard], size, offset)))


class ArrayStore(Store):
    """Pictures of one size in memory: images [n,h,w] or [n,h,w,C], uint8 or float."""

    def __init__(self, where: str, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        """where: what to call the array to a user."""
        if images.ndim not in (3, 4):
            raise DataError(
                f"data: {where}: images must be [n,h,w] or [n,h,w,channels], got shape {images.shape}"
            )
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise DataError(f"data: {where}: images must be uint8 or float, got {images.dtype}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise DataError(f"data: {where}: labels must have shape ({len(images)},), got {labels.shape}")
        self.where = where
        self.floating = images.dtype != np.uint8
        self.images = images.astype(np.float32, copy=False) if self.floating else images
        if labels is not None:
            self.classes, self.labels = number_classes([str(label) for label in labels.tolist()])

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.where}[{index}]"

    def load(self, index: int) -> np.ndarray:
        image = self.images[index]
        return image[..., None] if image.ndim == 2 else image


def read_npz(path: Path, prefix: str = "") -> ArrayStore | None:
    """The arrays `<prefix>images` and, if there, `<prefix>labels` of a .npz; None without the first.

    Without any name ending in "images", the only array of at least 3 dimensions is taken.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = list(arrays)
            wanted = prefix + "images"
            if wanted not in names and not prefix and not any(n.endswith("images") for n in names):
                large = [n for n in names if arrays[n].ndim >= 3]
                if len(large) != 1:
                    raise DataError(
                        f"data: {path}: needs an array called images, has {', '.join(names) or 'nothing'}"
                    )
                wanted = large[0]
            if wanted not in names:
                return None
            labels = arrays[prefix + "labels"] if prefix + "labels" in names else None
            store = ArrayStore(f"{path}:{wanted}", arrays[wanted], labels)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"data: {path}: not a readable .npz: {error}") from None
    store.unlabelled = f"{path} has no array called {prefix}labels"
    return store


class Subset(Store):
    """Some pictures of a store."""

    def __init__(self, store: Store, indices: np.ndarray) -> None:
        self.store, self.indices = store, indices
        self.classes, self.unlabelled, self.floating = store.classes, store.unlabelled, store.floating
        self.labels = None if store.labels is None else store.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.store.name(int(self.indices[index]))

    def load(self, index: int) -> Image.Image | np.ndarray:
        return self.store.load(int(self.indices[index]))


def open_store(path: Path) -> Store:
    """The pictures at a path; DataError when there are none."""
    store: Store | None
    if path.is_dir():
        store = TarStore(path) if any(path.glob("*.tar")) else FolderStore(path)
    elif path.suffix == ".npz":
        store = read_npz(path)
    elif path.suffix == ".tar":
        store = TarStore(path)
    else:
        raise DataError(
            f"data: {path}: images come from a folder, .npz or .tar, got {path.suffix or 'no extension'!r}"
        )
    if store is None or not len(store):
        raise DataError(
            f"data: {path}: no pictures in it; known: {', '.join(sorted(EXTENSIONS))}, .tar, .npz"
        )
    return store
