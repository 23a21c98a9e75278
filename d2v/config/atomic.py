"""Files that are there whole or not at all: the one writer of what a run or a conversion leaves."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends; after an error `path` is as it was.

    It is flushed to disk before it takes the place, so not even a power cut leaves half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`path` holds `text`, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any, **how: Any) -> None:
    """`path` holds `value` as JSON and ends with a line's end; how: as json.dumps takes it."""
    write_text(path, f"{json.dumps(value, **how)}\n")


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
