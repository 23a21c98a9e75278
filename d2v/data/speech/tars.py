"""Sounds in tar shards, and what is said of them within."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..shards import Shards
from ..splits import NO_PART, WHOLE, around, in_no_part, parts_of
from ..tables import TEXTS
from ..types import DataError, Report, Unreadable

BESIDE = (".txt", ".lab", ".trn")
"""suffixes of a transcript that belongs to a sound"""


class TarSounds:
    """The sounds of tar shards, by name; of several members of one name the last, as tar unpacks them."""

    def __init__(self, shards: Shards, chosen: Sequence[int], level: int) -> None:
        """chosen: numbers of members. level: of the folders of classes within the tars."""
        self.shards, self.level = shards, level
        self.places = {shards.name(index): index for index in chosen}

    def encoded(self, name: str) -> bytes:
        """The bytes of a sound. Unreadable for none, and where the shard cannot be read."""
        try:
            content = self.shards.read(self.places[name])
        except OSError as error:
            raise Unreadable(str(error)) from None
        if not content:
            raise Unreadable("the file is empty")
        return content

    def texts(self) -> dict[str, str]:
        """What is said in the sounds that have a transcript: a text of the same key, else in its .json."""
        said = {name: self._text(index) for name, index in self.places.items()}
        return {name: text for name, text in said.items() if text is not None}

    def _text(self, index: int) -> str | None:
        texts = (self.shards.beside(index, suffix) for suffix in BESIDE)
        text = next((text for text in texts if text is not None), None)
        if text is not None or (described := self.shards.beside(index, ".json")) is None:
            return text
        try:
            values = json.loads(described)
        except ValueError as error:
            raise DataError(f"data: {self.shards.name(index)}: its .json: {error}") from None
        found = (values.get(key) for key in TEXTS) if isinstance(values, dict) else ()
        return next((text for text in found if isinstance(text, str)), None)

    def classes(self) -> tuple[dict[str, str], str]:
        """Of every sound that has one its class, from .cls, else from folders; and why others have none."""
        named = {name: self.shards.beside(index, ".cls") for name, index in self.places.items()}
        if not any(named.values()):
            files = self.shards.files
            folders = {name: files[index].split("/") for name, index in self.places.items()}
            named = {n: f[self.level] if len(f) > self.level + 1 else None for n, f in folders.items()}
        missing = next((name for name, of in named.items() if not of), "")
        why = f"{missing} has no .cls beside it and lies in no folder of a class" if missing else ""
        return {name: of for name, of in named.items() if of}, why


def sounds_of_tars(
    root: Path, files: Sequence[str], kinds: Sequence[str], report: Report
) -> tuple[TarSounds, dict[str, np.ndarray]]:
    """The sounds in tars, and the numbers of those of each part: by the names of the shards, else by folders
    within them.

    files: the tars, relative to root. What is not read is named in `report`. DataError for broken tars.
    """
    shards = Shards([root / file for file in files], kinds, (".cls", ".json", *BESIDE))
    for reason, left in shards.left_out.items():
        report.leave_out(reason, left)
    members = list({shards.name(index): index for index in range(len(shards))}.values())
    names = shards.files
    within = [names[index] for index in members]
    by_shard = parts_of(list(files), str(root), stems=True) if len(files) > 1 else {WHOLE: np.arange(1)}
    if WHOLE in by_shard:
        parts = parts_of(within, str(root))
        level = around(within) + int(WHOLE not in parts)
        report.leave_out(NO_PART, in_no_part(within, parts))
    else:
        report.leave_out(NO_PART, in_no_part(files, by_shard))
        of = np.array([shards.members[index][0] for index in members], np.int64)
        parts = {part: np.flatnonzero(np.isin(of, some)) for part, some in by_shard.items()}
        level = around([within[i] for some in parts.values() for i in some.tolist()])
    chosen = [members[i] for some in parts.values() for i in some.tolist()]
    ends = np.cumsum([0, *map(len, parts.values())])
    numbers = {part: np.arange(ends[i], ends[i + 1]) for i, part in enumerate(parts)}
    return TarSounds(shards, chosen, level), numbers
