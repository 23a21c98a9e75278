"""How a data set is divided: by the names of its parts, else a fifth of every class is held out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from .types import DataError, Report

Kind = Literal["train", "valid", "test"]

NAMES: dict[Kind, tuple[str, ...]] = {
    "train": ("train", "training"),
    "valid": ("dev", "devel", "development", "valid", "validation", "val", "eval", "evaluation"),
    "test": ("test", "testing", "heldout", "holdout"),
}
"""of parts, in any case, in the order in which they are scored. A name may go on after it with anything but a
letter, or with set or data, as in train-clean-100, val2017, testset, train-00000-of-00004"""
_NAME = re.compile(
    "(" + "|".join(name for names in NAMES.values() for name in names) + ")(set|data)?(?![^\\W\\d_]).*",
    re.DOTALL,
)
_NUMBERED = re.compile(r"[-_.]?\d+(-of-\d+)?$")
"""what tells the files of one part from one another: val-000, dev-00000-of-00002"""

WHOLE = "all"
"""name of the one part of what is not divided"""
NO_PART = "in no part"
"""why files beside named parts are left out"""
T = TypeVar("T")


def kind_of(name: str) -> Kind | None:
    """Of which part files of a name are, as of a folder, shard, table or manifest; None for others."""
    found = _NAME.fullmatch(name.lower())
    return None if found is None else next(kind for kind, names in NAMES.items() if found[1] in names)


def around(files: Sequence[str]) -> int:
    """How many folders lie around all of the files, as LibriSpeech/ does around its parts: they neither name
    a part nor are the last above a file, which may be a class."""
    if not files or any(map(os.path.isabs, files)):
        return 0
    shared = Path(os.path.commonpath([os.path.dirname(file) for file in files])).parts
    named = next((depth for depth, folder in enumerate(shared) if kind_of(folder)), len(shared))
    return min(named, max(0, min(len(Path(file).parts) for file in files) - 2))


def parts_of(files: Sequence[str], path: str, *, stems: bool = False) -> dict[str, np.ndarray]:
    """The numbers of the files of each part [k], ascending int64: "train", then what is held out.

    files: relative to the data set's folder; a part is known by the first folder (within those `around` all
    files), or with `stems` (of shards, tables and manifests) by the file's own name where that names one.
    Held-out parts, those for validation first, have their names in lower case, without numbers of files. Of
    what is not divided there is one part, `WHOLE`; files beside named parts are in none of them.
    DataError where a part for training lies beside folders that are neither parts nor held out.
    """
    named: dict[str, list[int]] = {}
    others: dict[str, list[int]] = {}
    outer = around(files)
    for number, file in enumerate(files):
        folder, *below = Path(file).parts[outer:]
        stem = os.path.basename(file).partition(".")[0]
        name = next((name for name in ([folder] if below else []) + [stem] * stems if kind_of(name)), None)
        where, key = (others, folder if below else "") if name is None else (named, name)
        where.setdefault(key, []).append(number)
    train = [name for name in named if kind_of(name) == "train"]
    held = [name for name in named if name not in train]
    if others and bool(train) != bool(held):
        if train and any(others):
            raise DataError(
                f"data: {path}: {train[0]} lies beside {next(filter(None, others))}: is it a part, or a "
                "class? Name what is held out dev or test, or choose one of the folders"
            )
        named, train, held = {}, [], []
    if not named:
        return {WHOLE: np.arange(len(files))}
    order = list(NAMES)
    parts: dict[str, list[int]] = {"train": []} if train else {}
    for name in (
        *sorted(train),
        *sorted(held, key=lambda name: (order.index(kind_of(name) or "test"), name)),
    ):
        part = "train" if name in train else _NUMBERED.sub("", name.lower())
        parts.setdefault(part, []).extend(named[name])
    return {part: np.sort(np.array(numbers, np.int64)) for part, numbers in parts.items()}


def in_no_part(files: Sequence[str], parts: Mapping[str, np.ndarray]) -> list[str]:
    """The files [n] that none of the parts has, as `parts_of` divides them."""
    chosen = set(np.concatenate([*parts.values()]).tolist())
    return [file for number, file in enumerate(files) if number not in chosen]


def for_training(parts: Mapping[str, T], report: Report) -> T:
    """The part that pretraining reads, said in the report; DataError where everything is held out."""
    to_divide(parts, report.path)
    name = "train" if "train" in parts else WHOLE
    if others := [part for part in parts if part != name]:
        report.notes.append(f"of {report.path} the part {name} is read, {', '.join(others)} left out")
    return parts[name]


def to_divide(parts: Mapping[str, T], path: str) -> T | None:
    """What has to be divided by `divide`, as nothing is held out; None where there are parts already.

    DataError where everything is held out.
    """
    if "train" not in parts and WHOLE not in parts:
        raise DataError(f"data: {path}: holds {', '.join(parts)} and no part for training")
    return next(iter(parts.values())) if len(parts) == 1 else None


def to_score(parts: Mapping[str, T]) -> dict[str, T]:
    """What a model is scored on: what is held out, or all of it where nothing is."""
    return {name: part for name, part in parts.items() if name != "train"} or dict(parts)


def labelled(parts: Mapping[str, T], lacks: Callable[[T], str], report: Report) -> dict[str, T]:
    """The parts without those that are held out and have no labels, which the report names, as long as any is
    left. lacks: why a part has none, empty where it has."""
    reasons = {name: lacks(part) for name, part in parts.items() if name not in ("train", WHOLE)}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    if len(reasons) == len(parts):
        return dict(parts)
    for name, reason in reasons.items():
        report.leave_out(f"held out without labels ({reason})", [f"{report.path}, part {name}"])
    return {name: part for name, part in parts.items() if name not in reasons}


def training_classes(
    classes: Mapping[str, Sequence[str]], path: str, known: Sequence[str] | None = None
) -> list[str]:
    """The classes of "train", or those `known` of a model, which number those of all parts.

    classes: of each part, in order. DataError for less than two classes, where nothing is held out, and for a
    class that is held out alone.
    """
    if known is None:
        if len(classes) < 2:
            raise DataError(f"data: {path}: every class has one sample alone, so none is left for testing")
        known = classes["train"]
        if len(known) < 2:
            raise DataError(f"labels missing: {path}: at least 2 classes are needed, got {list(known)}")
    for part, names in classes.items():
        if unknown := sorted(set(names) - set(known)):
            raise DataError(
                f"data: {path}: class {unknown[0]!r} of part {part} is not among the training classes"
            )
    return list(known)


def divide(classes: Sequence[Hashable]) -> dict[str, np.ndarray]:
    """The sample numbers of "train" and "test", ascending int64: of each class a fifth at random for testing.

    classes: that of every sample, all the same where there are none. A class of 2 to 4 gives one sample, a
    class of one none. The division depends on the classes alone.
    """
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(classes))
    members: dict[Hashable, list[int]] = {}
    for number in order.tolist():
        members.setdefault(classes[number], []).append(number)
    shares = {name: max(len(some) // 5, int(len(some) > 1)) for name, some in members.items()}
    test = np.sort(np.array([n for name, some in members.items() for n in some[: shares[name]]], np.int64))
    return {"train": np.setdiff1d(np.arange(len(classes)), test), "test": test}
