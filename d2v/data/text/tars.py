"""Texts in tar shards: a .txt is a document, and so is the text of a .json object, or of a line of .jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from ..lines import not_utf8
from ..shards import Shards
from ..types import Unreadable
from .records import text_or_reason

TAR = ".tar"
MEMBERS = (".txt", ".json", ".jsonl")
"""suffixes of what holds texts; beside a .txt the others describe it"""


def texts_of(shard: Shards, column: str) -> Iterator[tuple[str, str, str | None]]:
    """The name of each document, its text, and why it cannot be read."""
    suffixes = [os.path.splitext(name)[1].lower() for name in shard.files]
    read = (".txt",) if ".txt" in suffixes else MEMBERS
    for index, suffix in enumerate(suffixes):
        if suffix not in read:
            continue
        name = shard.name(index)
        try:
            text = shard.read(index).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield name, "", not_utf8(error)
        except (OSError, Unreadable) as error:
            yield name, "", str(error)
        else:
            if suffix == ".txt":
                yield name, text, None
                continue
            lines = text.split("\n") if suffix == ".jsonl" else [text]
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{name}:{number}", *_text_in(line, column)


def _text_in(line: str, column: str) -> tuple[str, str | None]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "", f"not JSON that can be read: {error}"
    return text_or_reason(record if isinstance(record, dict) else {}, column)
