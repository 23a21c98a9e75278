"""A folder, tar or array of pictures as training data, labelled parts and a report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ...config.run import Config
from ..embedded import digits
from ..loader import Loader
from ..splits import WHOLE, divide, for_training, labelled, to_divide, to_score, training_classes
from ..types import (
    Batch,
    DataError,
    Labelled,
    LabelledBatch,
    Pipeline,
    Report,
    Split,
    Unreachable,
    Unreadable,
)
from .parts import open_stores
from .source import ImageSource
from .store import ArrayStore, Store, Subset

RAW_SIDE = 32
"""largest side of the pixels that serve as baseline"""


def _digits(split: str) -> ArrayStore:
    store = ArrayStore(f"digits/{split}", *digits.scenes(split))
    store.classes = digits.CLASSES
    return store


def _open(path: str, cfg: Config, purpose: str, report: Report) -> ImageSource:
    """The pictures for training, or all of them; what is not read is named in the report."""
    if path == "digits":
        store: Store = _digits("train" if purpose == "train" else "test")
    elif purpose == "train":
        store = for_training(open_stores(Path(path), report, label=cfg.data.label_column), report)
    else:
        store = open_stores(Path(path), report, divided=False)[WHOLE]
    report.total = len(store)
    return ImageSource(path, store, cfg)


def open_data(
    path: str,
    cfg: Config,
    *,
    device: torch.device,
    purpose: str,
    run_dir: Path | None,
) -> Pipeline:
    """See `d2v.data.open.open_data`; nothing is kept in `run_dir`."""
    report = Report.of(path, cfg.data)
    return Loader(_open(path, cfg, purpose, report).prepare(cfg.data), cfg.data, device, report)


class ImageSplit(Split):
    """Labelled pictures; unreadable ones are left out of both iterators."""

    def __init__(self, source: ImageSource, cfg: Config, report: Report | None = None) -> None:
        """report: continued from opening the data set."""
        self.loader = Loader(source, cfg.data, torch.device("cpu"), report)
        self.source, self.cfg = source, cfg
        assert source.store.labels is not None
        self.labels = source.store.labels

    def __len__(self) -> int:
        return len(self.source)

    def select(self, keep: np.ndarray) -> ImageSplit:
        return ImageSplit(self.source.select(keep), self.cfg)

    def batches(self, size: int) -> Iterator[LabelledBatch]:
        """Normalised pictures [B,C,H,W], None, labels [B]."""
        return self._labelled(self.loader.in_order(size))

    def drawn(self, choices: Iterable[np.ndarray]) -> Iterator[LabelledBatch]:
        """See `Split.drawn`; one loader reads them all."""
        return self._labelled(self.loader.chosen(choices))

    def _labelled(self, loaded: Iterable[tuple[list[str], Batch]]) -> Iterator[LabelledBatch]:
        for _, batch in loaded:
            yield batch.source, None, torch.from_numpy(self.labels[batch.ids.numpy()])

    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        """Normalised pixels, averaged down to at most 32x32, flattened."""
        front = self.source.front
        side = min(RAW_SIDE, front.height), min(RAW_SIDE, front.width)
        features, labels = [], []
        for pictures, _, some in self.batches(256):
            features.append(F.adaptive_avg_pool2d(pictures, side).flatten(1).numpy())
            labels.append(some.numpy())
        return np.concatenate(features), np.concatenate(labels)


def _parts(path: str, report: Report, label: str, score: bool) -> dict[str, Store]:
    """Train and held-out pictures: as they are divided on disk, else by `divide`; or those to score."""
    if path == "digits":
        return {"train": _digits("probe"), "test": _digits("test")}
    stores = open_stores(Path(path), report, label=label, labelled=True)
    stores = labelled(stores, lambda store: store.unlabelled if store.labels is None else "", report)
    if score:
        return to_score(stores)
    whole = to_divide(stores, path)
    if whole is None:
        return stores
    classes = np.zeros(len(whole)) if whole.labels is None else whole.labels
    return {part: Subset(whole, some) for part, some in divide(classes.tolist()).items() if len(some)}


def open_labelled(
    path: str, cfg: Config, *, run_dir: Path | None, classes: Sequence[str] | None = None
) -> Labelled:
    """See `d2v.data.open.open_labelled`. Labels come from class folders, `labels` of a .npz, or .cls in a
    tar; the parts from the names of folders and shards, from `test_images` of a .npz, or by `divide`."""
    report = Report.of(path, cfg.data)
    parts = _parts(path, report, cfg.data.label_column, score=classes is not None)
    for store in parts.values():
        if store.labels is None:
            raise DataError(f"labels missing: {path}: {store.unlabelled}")
    classes = training_classes({name: store.classes for name, store in parts.items()}, path, classes)
    for store in parts.values():
        number = np.array([classes.index(name) for name in store.classes], dtype=np.int64)
        store.labels, store.classes = number[store.labels], classes
    sources = {name: ImageSource(path, store, cfg) for name, store in parts.items()}
    # all parts are normalised alike, with what was found on the training part
    train = sources.get("train", next(iter(sources.values()))).prepare(cfg.data)
    for source in sources.values():
        source.normalisation = train.normalisation
    report.total = len(train)
    splits = {
        name: ImageSplit(source, cfg, report if source is train else None) for name, source in sources.items()
    }
    return Labelled(splits, classes, "sample", train.meta)


def check_data(path: str, cfg: Config, report: Report, any_batch: bool) -> None:
    """See `d2v.data.open.check_data`: sizes and classes of the pictures."""
    source = _open(path, cfg, "train", report)
    store = source.store

    def look(index: int) -> tuple[str, list[str]] | str:
        """The size and what is done to the picture, or why it cannot be read."""
        try:
            return source.look(index)
        except Unreachable:
            raise
        except (DataError, Unreadable) as error:
            return str(error)

    sizes: Counter[str] = Counter()
    treated: dict[str, list[int]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, found in enumerate(pool.map(look, range(len(store)))):
            if isinstance(found, str):
                report.unreadable[store.name(index)] = found
                continue
            sizes[found[0]] += 1
            for what in found[1]:
                treated.setdefault(what, []).append(index)
    report.notes += [
        f"{len(some):,} of {len(store):,} pictures are {what}: the first is {store.name(some[0])}"
        for what, some in treated.items()
    ]
    report.facts |= {"sizes (width x height)": dict(sizes.most_common(20)), "channels": source.front.channels}
    if store.labels is None:
        report.facts["labels"] = f"none: {store.unlabelled}"
    else:
        counts = np.bincount(store.labels, minlength=len(store.classes)).tolist()
        report.facts["classes"] = dict(zip(store.classes, counts, strict=True))
    report.stop_if_too_many()
    source.prepare(cfg.data)
    if not any_batch:
        Loader(source, cfg.data, torch.device("cpu")).check_batch()
