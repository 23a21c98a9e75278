"""Pictures in tar shards, and their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..loader import number_classes
from ..shards import Shards
from .store import EXTENSIONS, Store, decoded


class TarStore(Store):
    """Uncompressed tar shards as webdataset writes them: key.jpg, key.cls with the class; see `Shards`."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = Shards(shards, EXTENSIONS)
        self.files, self.left_out = self.shards.files, self.shards.left_out

    def classify(self, level: int) -> None:
        """Take the classes from the .cls files; without any from folders within the tar, or from the names of
        the tars, where the names of all their members begin with them: n01440764_18.JPEG in n01440764.tar.

        level: of the folders of classes, 0 for the first
        """
        listed = [self.shards.beside(index, ".cls") for index in range(len(self))]
        parts = [name.split("/") for name in self.files]
        if not any(listed) and all(len(p) > level + 1 for p in parts) and len({p[level] for p in parts}) > 1:
            listed = [p[level] for p in parts]
        elif not any(listed):
            stems = [Path(str(self.shards.shards[shard])).stem for shard, *_ in self.shards.members]
            if all(p[-1].startswith(f"{stem}_") for p, stem in zip(parts, stems, strict=True)):
                listed = [*stems]
        if None in listed:
            self.unlabelled = f"{self.name(listed.index(None))} has no .cls beside it"
        else:
            self.classes, self.labels = number_classes([name for name in listed if name is not None])

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        return self.shards.name(index)

    def load(self, index: int) -> Image.Image:
        return decoded(self.shards.read(index))
