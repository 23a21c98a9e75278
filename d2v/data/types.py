"""The types every modality shares: batches, pipelines, labelled splits, reports, errors."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.run import DataConfig
from .normalisation import Normalisation

FEW_UNREADABLE = 10
"""samples that may be unreadable however small a data set is"""
EXAMPLES = 3
"""names given for each kind of fault"""


class DataError(ValueError):
    """The data cannot be used; the message names the path and what is wrong."""


class Unreachable(DataError):
    """A network, not a sample, is at fault: it ends what reads."""


class Unreadable(Exception):
    """One sample cannot be read: raised by `Source.read`, counted and replaced by the loader."""


class Position(NamedTuple):
    """Where a run stands in its data: the next global step to load. Plain ints, JSON-able."""

    epoch: int = 0
    step_in_epoch: int = 0


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the model once `Source.finish` has run on the device."""

    source: Tensor
    """image [B,C,H,W] float; audio [B,samples] float; text [B,T] int64"""
    ids: Tensor
    """[B] int64: stable numbers of the samples in their data set"""
    epoch: int
    padding_mask: Tensor | None = None
    """[B,samples] or [B,T] bool, True where padded"""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """what `Source.finish` needs besides the source (for images: crop boxes and flips)"""
    lengths: list[int] | None = None
    """audio: samples of each row before its padding; None: all"""
    kept_ids: Tensor | None = None
    """the ids in the host's memory, from before `to`"""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def host_ids(self) -> Tensor:
        """The ids in the host's memory; of a batch that `to` took from there no device is waited for."""
        return self.ids.cpu() if self.kept_ids is None else self.kept_ids

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        mask = None if self.padding_mask is None else f(self.padding_mask)
        extra = {name: f(value) for name, value in self.extra.items()}
        return replace(self, source=f(self.source), ids=f(self.ids), padding_mask=mask, extra=extra)

    def to(self, device: torch.device | str) -> Batch:
        """Copy to `device`; asynchronous from pinned memory."""
        moved = self._map(lambda t: t.to(device, non_blocking=True))
        on_host = self.kept_ids is None and self.ids.device.type == "cpu"
        return replace(moved, kept_ids=self.ids if on_host else self.kept_ids)

    def clone(self) -> Batch:
        """A copy that shares nothing."""
        kept = None if self.kept_ids is None else self.kept_ids.clone()
        return replace(self._map(Tensor.clone), kept_ids=kept)

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when pinning is on."""
        return self._map(Tensor.pin_memory)


@dataclass
class Report:
    """What a data set holds and what was wrong with it. Counted while training, whole after `check_data`."""

    path: str
    total: int
    """samples (images, utterances, text files) of the part that is read, readable or not"""
    unreadable: dict[str, str] = field(default_factory=dict)
    """name -> reason"""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """reason -> samples left out on purpose, such as utterances that are too short"""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """reason -> files that are no samples, such as those with a suffix that is not read"""
    facts: dict[str, Any] = field(default_factory=dict)
    """JSON-able findings: sizes, sample rates, histograms, classes"""
    notes: list[str] = field(default_factory=list)
    """what was done to samples that a user should hear of once"""
    max_unreadable: float = DataConfig.max_unreadable
    """share of the samples that may be unreadable"""

    refused: str = ""
    """why training would refuse the data set, found by `check_data`; empty where it would not"""

    @classmethod
    def of(cls, path: str, cfg: DataConfig) -> Report:
        """Of a data set that is about to be opened."""
        return cls(path, 0, max_unreadable=cfg.max_unreadable)

    def skip(self, reason: str, names: Sequence[str]) -> None:
        """Name samples that are left out on purpose."""
        if names:
            self.skipped.setdefault(reason, []).extend(names)

    def leave_out(self, reason: str, names: Sequence[str]) -> None:
        """Name files that are no samples."""
        if names:
            self.left_out.setdefault(reason, []).extend(names)

    def add_note(self, what: str, name: str) -> None:
        """Note what was done to samples, once, and the first of them."""
        if not any(note.startswith(f"{what}: ") for note in self.notes):
            self.notes.append(f"{what}: the first is {name}")

    def add_unreadable(self, name: str, reason: str) -> None:
        """Count one unreadable sample; too many raise `DataError` with the list."""
        self.unreadable[name] = reason
        self.stop_if_too_many()

    @property
    def allowed(self) -> int:
        """How many samples may be unreadable: the share, but at least 10 unless those are more than half."""
        share = int(self.max_unreadable * self.total)
        return max(share, min(FEW_UNREADABLE, self.total // 2)) if self.max_unreadable else 0

    def stop_if_too_many(self) -> None:
        """Raise `DataError` listing what is unreadable when that is too much of the data set."""
        if len(self.unreadable) > self.allowed:
            listed = "\n".join(f"  {line}" for line in by_kind(self.unreadable))
            raise DataError(
                f"data: {self.path}: {len(self.unreadable):,} of {self.total:,} samples unreadable, more "
                f"than {self.allowed:,} (data.max_unreadable is {self.max_unreadable:g}):\n{listed}"
            )

    def lines(self, most: int = EXAMPLES) -> list[str]:
        """A line for each kind of file that is not used, with how many there are and `most` examples."""
        return [
            *(f"unreadable {line}" for line in by_kind(self.unreadable, most)),
            *(f"skipped {_kind(reason, names, most)}" for reason, names in self.skipped.items()),
            *(f"left out {_kind(reason, names, most)}" for reason, names in self.left_out.items()),
        ]


def unused(parts: Iterable[Any]) -> list[str]:
    """What the parts of a data set leave out, a line for each kind; parts may share a report."""
    found: list[str] = []
    for part in parts:
        report = getattr(part, "report", None) or getattr(getattr(part, "loader", None), "report", None)
        found += [] if report is None else report.lines()
    return list(dict.fromkeys(found))


def by_kind(reasons: Mapping[str, str], most: int = EXAMPLES) -> list[str]:
    """A line for all names whose reasons differ in nothing but numbers: count, first reason, `most` names."""
    kinds: dict[str, tuple[str, list[str]]] = {}
    for name, reason in reasons.items():
        kinds.setdefault(re.sub(r"\d[\d.,]*", "#", reason), (reason, []))[1].append(name)
    return [_kind(reason, names, most) for reason, names in kinds.values()]


def _kind(reason: str, names: Sequence[str], most: int) -> str:
    if len(names) == 1:
        return f"{names[0]}: {reason}"
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{len(names):,}: {reason}: {', '.join(names[:most])}{more}"


class Pipeline(ABC):
    """Batches of one data set, forever, as a function of (train.seed, position) alone."""

    position: Position
    """the step after the last one that was yielded: resume from here"""
    report: Report
    meta: dict[str, Any]
    """JSON-able, stored in the run directory: image mean and std, tokenizer path"""
    normalisation: Normalisation | None
    """of pictures: what the config says, else ImageNet's or measured on this data set"""

    @abstractmethod
    def micro_batches(self, start: Position, micro: int) -> Iterator[list[Batch]]:
        """One list of micro-batches per global step, on the device, from `start` on, without end.

        micro: largest micro-batch, in the unit of `data.batch`. The samples of a step do not depend
        on it, nor on `data.workers`.
        """

    @abstractmethod
    def in_order(self, size: int) -> Iterator[tuple[list[str], Batch]]:
        """Every readable sample once, in the order of the data set, with its name (`d2v extract`)."""


LabelledBatch = tuple[Tensor, Tensor | None, Tensor]
"""source, padding_mask, labels: [B] int64 per sample, or [B,T] int64 per token with -1 where there is none"""


class Split(ABC):
    """One labelled part of a data set, always in the same order and without augmentation."""

    labels: Any
    """of its samples: the number of a class each, or those of its tokens"""

    @abstractmethod
    def __len__(self) -> int:
        """Samples."""

    @abstractmethod
    def batches(self, size: int) -> Iterator[LabelledBatch]:
        """All samples, `size` at a time (the last batch may be smaller), on the CPU."""

    @abstractmethod
    def select(self, keep: np.ndarray) -> Split:
        """The samples numbered `keep` [k] int64, in that order."""

    def drawn(self, choices: Iterable[np.ndarray]) -> Iterator[LabelledBatch]:
        """A batch for each array of sample numbers [k] int64, of which there may be no end."""
        for keep in choices:
            yield from self.select(keep).batches(len(keep))

    @abstractmethod
    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        """The baseline a probe must beat: features [n,f] float32 of the raw input and labels [n] int64,
        one row per sample, or per labelled token where labels are per token."""


@dataclass(frozen=True)
class Labelled:
    """A labelled data set for probes: `splits` holds "train", "test" and maybe further test splits."""

    splits: Mapping[str, Split]
    classes: Sequence[str]
    level: Literal["sample", "token"]
    """whether a label belongs to a whole sample or to each of its tokens"""
    meta: dict[str, Any] = field(default_factory=dict)
