"""From a path to the pictures of each part of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...config.run import DataConfig
from ..arrow import SUFFIXES as ROWS
from ..arrow import Rows, listed
from ..loader import number_classes
from ..splits import NO_PART, WHOLE, around, in_no_part, parts_of
from ..tables import CLASSES, IN_NO_TABLE, columns_of, read_described, tables_in
from ..tables import SUFFIXES as TABLES
from ..types import DataError, Report
from ..walk import suffix_of, walk
from .store import EXTENSIONS, FolderStore, Store, Subset, decoded, opened, read_npz
from .tar import TarStore

KNOWN = ", ".join((*sorted(EXTENSIONS), ".tar", ".npz", *ROWS))
"""suffixes"""


def part_of(store: Store, numbers: np.ndarray) -> Store:
    """The pictures of a part [k], with the classes that occur in it."""
    part = Subset(store, numbers)
    if store.labels is not None:
        part.classes, part.labels = number_classes([store.classes[k] for k in store.labels[numbers]])
    return part


class RowStore(Store):
    """The rows of Hugging Face data sets."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        labels, self.unlabelled = rows.labels(), rows.unlabelled
        if labels is not None:
            self.classes, self.labels = number_classes(labels)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows.name(index)

    def load(self, index: int) -> Image.Image:
        value = self.rows.encoded(index)
        return opened(str(value)) if isinstance(value, Path) else decoded(value or b"")


def open_stores(
    path: Path,
    report: Report,
    *,
    divided: bool = True,
    label: str = DataConfig.label_column,
    labelled: bool = False,
) -> dict[str, Store]:
    """The pictures of each part of a data set: "train" and held-out ones, or all of them as `WHOLE`.

    divided: False takes all as `WHOLE` (of a .npz those for training). label: the column of classes in
    tables. labelled: leaves out what tables do not name. What is not read is named in `report`. DataError
    when there are no pictures.
    """
    stores: Mapping[str, Store | None]
    if path.is_dir():
        stores = _of_folder(path, report, divided, label, labelled)
    elif suffix_of(path.name) in ROWS:
        stores = _of_rows(path.parent, [path.name], report, divided, label)
    elif path.suffix.lower() == ".npz":
        whole, test = read_npz(path), read_npz(path, "test_") if divided else None
        stores = {WHOLE: whole} if test is None else {"train": whole, "test": test}
    elif path.suffix.lower() == ".tar":
        stores = _of_tars([path], path.parent, report, divided)
    elif path.suffix.lower() in EXTENSIONS:
        stores = {WHOLE: FolderStore(path.parent, [path.name])}
    else:
        suffix = path.suffix or "no extension"
        raise DataError(f"data: {path}: images come from a folder or a file ({KNOWN}), got {suffix!r}")
    found = {name: store for name, store in stores.items() if store is not None and len(store)}
    if not found:
        left = "".join(f"; {line}" for line in report.lines())
        raise DataError(f"data: {path}: no pictures in it; known: {KNOWN}{left}")
    report.facts["parts"] = {name: len(store) for name, store in found.items()}
    return found


def _of_folder(path: Path, report: Report, divided: bool, label: str, labelled: bool) -> Mapping[str, Store]:
    found = walk(path, {*EXTENSIONS, *ROWS, ".tar", *TABLES})
    report.left_out |= found.left_out
    if rows := [file for file in found.files if suffix_of(file) in ROWS]:
        report.leave_out("beside tables", [file for file in found.files if suffix_of(file) in EXTENSIONS])
        return _of_rows(path, rows, report, divided, label)
    shards = [path / file for file in found.files if suffix_of(file) == ".tar"]
    pictures = [file for file in found.files if suffix_of(file) in EXTENSIONS]
    if shards:
        report.leave_out("pictures beside tar files", pictures)
        return _of_tars(shards, path, report, divided)
    whole = {WHOLE: np.arange(len(pictures))}
    numbers = parts_of(pictures, str(path)) if divided else whole
    level = around(pictures) + int(WHOLE not in numbers)

    def stores(of: Mapping[str, str] | None = None) -> dict[str, FolderStore]:
        files = {part: [pictures[i] for i in some.tolist()] for part, some in numbers.items()}
        return {part: FolderStore(path, some, level, of) for part, some in files.items()}

    by_folder = stores()
    if label != DataConfig.label_column or not any(len(store.classes) > 1 for store in by_folder.values()):
        tables = tables_in(path, [file for file in found.files if suffix_of(file) in TABLES])
        wanted = columns_of(label, DataConfig.label_column, CLASSES)
        table = read_described(path, pictures, tables, wanted, report)
        if table is not None:
            numbers = table.parts or numbers if divided else whole
            report.leave_out(NO_PART, in_no_part(pictures, numbers))
            if labelled:
                report.leave_out(IN_NO_TABLE, [file for file in pictures if file not in table.of])
                has = np.array([file in table.of for file in pictures])
                numbers = {part: some[has[some]] for part, some in numbers.items()}
            return stores(table.of)
    report.leave_out(NO_PART, in_no_part(pictures, numbers))
    return by_folder


def _of_rows(root: Path, files: Sequence[str], report: Report, divided: bool, label: str) -> dict[str, Store]:
    files = listed(root, files, report)
    parts = {WHOLE: np.arange(len(files))}
    if divided and len(files) > 1:
        parts = parts_of(files, str(root), stems=True)
        report.leave_out(NO_PART, in_no_part(files, parts))
    return {
        name: RowStore(Rows([root / files[i] for i in some.tolist()], "Image", label))
        for name, some in parts.items()
    }


def _of_tars(shards: Sequence[Path], root: Path, report: Report, divided: bool) -> dict[str, Store]:
    """By the names of shards below root, else by folders within them."""
    names = [str(shard.relative_to(root)) for shard in shards]
    by_shard = {WHOLE: np.arange(len(shards))}
    if divided and len(shards) > 1:
        by_shard = parts_of(names, str(root), stems=True)
        report.leave_out(NO_PART, in_no_part(names, by_shard))
    stores: dict[str, Store] = {}
    for name, some in by_shard.items():
        store = TarStore([shards[i] for i in some.tolist()])
        for reason, members in store.left_out.items():
            report.leave_out(reason, members)
        if name == WHOLE:
            numbers = parts_of(store.files, str(root)) if divided else {WHOLE: np.arange(len(store))}
            store.classify(around(store.files) + int(WHOLE not in numbers))
            report.leave_out(NO_PART, in_no_part(store.files, numbers))
            return {part: store if part == WHOLE else part_of(store, some) for part, some in numbers.items()}
        store.classify(around(store.files))
        stores[name] = store
    return stores
