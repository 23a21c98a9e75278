"""Lines of users' files: UTF-8, ended by LF or CRLF and nothing else, without a byte order mark.

Form feeds, NEL, U+2028 and a CR alone are characters of a line (`str.splitlines` cuts there).
"""

from __future__ import annotations

import codecs

MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""byte order marks of encodings that are not read; UTF-32's begins with UTF-16's"""


def other_encoding(begin: bytes) -> str | None:
    """What a file that begins like this is, if it says that it is not UTF-8."""
    return next((f"{name}, not UTF-8: a byte order mark at byte 0"
                 for mark, name in MARKS.items() if begin.startswith(mark)), None)  # fmt: skip


def not_utf8(error: UnicodeDecodeError, offset: int = 0) -> str:
    """What is wrong with bytes that stand at `offset` of a file."""
    begin = error.object if offset == 0 else b""
    return other_encoding(begin) or f"not UTF-8: {error.reason} at byte {offset + error.start}"


def lines_of(data: bytes) -> list[str]:
    """The lines of a small file, without their ends. Raises UnicodeDecodeError."""
    lines = data.decode().removeprefix("\ufeff").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
