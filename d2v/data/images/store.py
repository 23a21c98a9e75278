"""Where pictures lie: a folder of files, tar shards, or arrays, each with random access by number.

A store hands out undecoded work: `load` opens picture i as a Pillow image (decoded when its pixels are
touched) or as an array, and knows names and labels. What is done with the pixels is in `pipeline`.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..loader import number_classes
from ..tables import IN_NO_TABLE
from ..types import DataError
from .eval_picture import Damaged, reason

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"))

MOST_BYTES = 1 << 30
"""in a file of one picture"""
DEFLATED = 1_032
"""the most bytes that one byte of a .npz can hold"""
_FROM_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def opened(path: str | int, offset: int = 0, size: int | None = None) -> Image.Image:
    """The picture in a file, or in `size` bytes from `offset` of it, of which only the header is read.

    path: its name, or an open file's descriptor. What Pillow warns of (odd metadata, sizes) is not said.
    Raises OSError, Damaged.
    """
    descriptor = os.open(path, os.O_RDONLY) if isinstance(path, str) else path
    try:
        size = os.fstat(descriptor).st_size if size is None else size
        if size > MOST_BYTES:
            raise Damaged(f"{size:,} bytes are too many for a picture, more than {MOST_BYTES:,}")
        data = os.pread(descriptor, size, offset)
    finally:
        if isinstance(path, str):
            os.close(descriptor)
    return decoded(data)


def decoded(data: bytes) -> Image.Image:
    """The picture in the bytes of a file, see `opened`."""
    if not data:
        raise Damaged("the file is empty")
    if _FROM_PILLOW not in warnings.filters:
        warnings.filterwarnings("ignore", module=_FROM_PILLOW[3].pattern)
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise Damaged("not a picture in a format that Pillow reads") from None
    except Exception as error:  # see `eval_picture.upright`
        raise Damaged(reason(error)) from None


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
    """Files at any depth below a folder, in sorted order; a folder above a file is its class."""

    def __init__(
        self, root: Path, files: Sequence[str], level: int = 0, classes: Mapping[str, str] | None = None
    ) -> None:
        """files: relative to root. level: of the folders of classes, 0 directly below root. classes: of
        files, where tables say so."""
        self.root, self.files = root, list(files)
        parts = [Path(file).parts for file in self.files]
        if classes is not None:
            bare = next((file for file in self.files if file not in classes), "")
            self.unlabelled = f"{bare}: {IN_NO_TABLE}"
            if not bare:
                self.classes, self.labels = number_classes([classes[file] for file in self.files])
        elif parts and all(len(p) > level + 1 for p in parts):
            self.classes, self.labels = number_classes([p[level] for p in parts])
        else:
            bare = next((file for file, p in zip(self.files, parts, strict=True) if len(p) <= level + 1), "")
            self.unlabelled = f"{bare} lies in no folder of a class"

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def load(self, index: int) -> Image.Image:
        return opened(self.name(index))


class ArrayStore(Store):
    """Pictures of one size in memory that processes share: images [n,h,w] or [n,h,w,C], uint8 or float."""

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
        with np.errstate(over="ignore"):  # what becomes inf is unreadable, picture by picture
            self.images = images.astype(np.float32, copy=False) if self.floating else images
        self._shared: torch.Tensor | None = None
        if labels is not None:
            self.classes, self.labels = number_classes([str(label) for label in labels.tolist()])

    def __getstate__(self) -> dict[str, Any]:
        """A tensor in shared memory goes to each process as a handle; an array would be copied, which is done
        where the system's shared memory is too small."""
        if self._shared is None:
            pixels = torch.from_numpy(np.require(self.images, requirements=["C", "W"]))
            try:
                self._shared = pixels.share_memory_()
            except RuntimeError:
                return dict(self.__dict__)
            self.images = self._shared.numpy()
        return {**self.__dict__, "images": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._shared is not None:
            self.images = self._shared.numpy()

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
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            shapes = {name: _shape(archive, name, path) for name in names}
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            wanted = prefix + "images"
            if wanted not in shapes and not prefix and not any(n.endswith("images") for n in shapes):
                large = [name for name, shape in shapes.items() if len(shape) >= 3]
                if len(large) != 1:
                    raise DataError(
                        f"data: {path}: needs an array called images, has {', '.join(shapes) or 'nothing'}"
                    )
                wanted = large[0]
            if wanted not in shapes:
                return None
            labels = arrays[prefix + "labels"] if prefix + "labels" in shapes else None
            store = ArrayStore(f"{path}:{wanted}", arrays[wanted], labels)
    except DataError:
        raise
    except Exception as error:  # of zipfile, zlib, struct and NumPy's parser, on whatever the file is
        raise DataError(f"data: {path}: not a readable .npz: {reason(error)}") from None
    store.unlabelled = f"{path} has no array called {prefix}labels"
    return store


def _shape(archive: zipfile.ZipFile, name: str, path: Path) -> tuple[int, ...]:
    """Of an array that is as large as its header says; else ValueError, before any of it is allocated."""
    info = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    if info.compress_size > path.stat().st_size or info.file_size > DEFLATED * max(1, info.compress_size):
        raise ValueError(f"{name} is not as large as the archive says")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        form = np.lib.format
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, _, dtype = read(file)
        held = info.file_size - file.tell()
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{name} has {held:,} bytes, not those of shape {shape}")
    return shape


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
