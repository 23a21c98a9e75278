"""What a run says and records of its data: what was left out, and whether a resumed run has the same."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.types import Report, by_kind
from .progress import Progress

MOST_SAID = 20
"""lines about unreadable samples while running, each of one sample or of several of a kind"""
DATA = "data.json"
"""file of a run: what the data set holds, what was left out and why, and what was measured on it"""


class SaidOfData:
    """Says once what is left out, of which data.json lists all, and what is done to other samples."""

    def __init__(self, report: Report) -> None:
        self.report, self._named, self._noted, self._said = report, 0, 0, 0

    def begin(self, progress: Progress) -> None:
        """Say what is known before the first step: a line for each kind of what is left out."""
        for line in replace(self.report, unreadable={}).lines():
            progress.say(line)
        self.catch_up(progress)

    def catch_up(self, progress: Progress) -> None:
        """Say what is new."""
        notes, unreadable = self.report.notes, self.report.unreadable
        for line in notes[self._noted :]:
            progress.say(line)
        self._noted = len(notes)
        new = dict(islice(unreadable.items(), self._named, None))
        self._named = len(unreadable)
        for line in by_kind(new):
            if self._said < MOST_SAID:
                progress.say(f"warning: cannot be read, left out: {line}")
            elif self._said == MOST_SAID:
                progress.say(f"warning: further unreadable samples are listed in {DATA} only")
            self._said += 1


def check_same_data(out: Path, path: str, found: dict[str, Any]) -> None:
    """A data set may have moved since the run in `out` began, but its samples are known by their numbers.

    found: what data.json would hold of it now; a run without the file, or the entry, is not checked.
    """
    if not (out / DATA).exists():
        return
    before = json.loads((out / DATA).read_text(encoding="utf-8"))
    for name, now in found.items():
        if (then := before.get(name, now)) != now:
            raise ValueError(
                f"train: {path} holds {_said(name, now, then)}, {out} was begun with "
                f"{_said(name, then, now)}: it can only be resumed on the same data"
            )


def _said(name: str, value: Any, other: Any) -> str:
    if isinstance(value, list):
        differing = [x for x, y in zip(value, other, strict=False) if x != y]
        return f"{name} {differing[0]!r}" if differing else f"{len(value)} {name}"
    if isinstance(value, dict):
        return f"the {name} {', '.join(f'{key} {count}' for key, count in value.items()) or 'none'}"
    return f"{value} samples"
