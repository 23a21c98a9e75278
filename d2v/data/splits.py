"""How a labelled data set is divided: by the names of its parts, else a fifth of every class is held out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

TRAIN = ("train", "training")
HELD_OUT = ("dev", "valid", "validation", "val", "eval", "test", "heldout", "holdout")
"""names of parts, in the order in which one is taken where several are there; their case does not matter"""

N = TypeVar("N", bound=str)


def named_parts(names: Iterable[N]) -> tuple[N, N] | None:
    """Of folders or files those of the training part and of the part that is held out; None without both."""
    by_name = {name.lower(): name for name in sorted(names, reverse=True)}
    train, held = ([by_name[name] for name in known if name in by_name] for known in (TRAIN, HELD_OUT))
    return (train[0], held[0]) if train and held else None


def is_training(name: str) -> bool:
    """Whether a name begins with that of the training part, as train-clean-100 does."""
    return name.lower().startswith(TRAIN)


def is_held_out(name: str) -> bool:
    """Whether a name begins with that of a part that is held out, as dev-other does."""
    return name.lower().startswith(HELD_OUT)


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
