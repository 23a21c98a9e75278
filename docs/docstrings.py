"""Docstrings as the API reference shows them: arguments are a list, what is returned and raised paragraphs.

A docstring of this project is plain text, in which a line `name: what it is` begins an argument of the
function (or of a class's constructor) and lines indented below it go on. Loaded by mkdocstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")
PARAGRAPH = re.compile(r"^(Returns?|Raises|Source|Yields)\b")


def as_markdown(text: str, names: set[str]) -> str:
    """The docstring of a function whose parameters are `names`."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        found = ARGUMENT.match(line)
        if found and {name.strip(" *") for name in found[1].split(",")} <= names:
            lines += [*([] if in_list else [""]), f"- `{found[1]}`: {found[2]}"]
            in_list = True
        elif line.startswith(" ") and in_list:
            lines.append(f"    {line.strip()}")
        elif in_list or PARAGRAPH.match(line):
            lines += ["", line]
            in_list = False
        else:
            lines.append(line)
    return "\n".join(lines)


class Arguments(griffe.Extension):
    """Rewrites the docstrings of functions and classes when they are read."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """A function or method."""
        if func.docstring:
            func.docstring.value = as_markdown(func.docstring.value, {p.name for p in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """A class: the names of its constructor and its fields."""
        made = cls.members.get("__init__")
        names = {name for name, member in cls.members.items() if member.is_attribute}
        names |= {p.name for p in made.parameters} if isinstance(made, griffe.Function) else set()
        if cls.docstring:
            cls.docstring.value = as_markdown(cls.docstring.value, names)
