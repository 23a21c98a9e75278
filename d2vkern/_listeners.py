"""Lists and dicts that receive what happens while a block runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Listener = TypeVar("Listener")


@contextmanager
def listening(listeners: list[Listener], one: Listener) -> Iterator[Listener]:
    """Put one among the listeners, in the block, and yield it."""
    listeners.append(one)
    try:
        yield one
    finally:
        # not the first that is equal: in blocks within blocks they may have heard the same
        listeners[:] = [other for other in listeners if other is not one]
