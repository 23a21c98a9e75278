"""What the commands share: tyro's parser with errors in one line, and the arguments many of them take."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Annotated, TypeVar

import tyro
from tyro import MISSING_NONPROP as MISSING
from tyro.conf import AvoidSubcommands, Positional, arg

T = TypeVar("T")
Model = Annotated[Positional[str], arg(metavar="RUN")]
DataPath = Annotated[str, arg(metavar="PATH")]
Backends = Annotated[str | None, arg(metavar="NAME")]


class UsageError(ValueError):
    """Arguments that cannot be understood; the message is ready for the user."""


def parse(options: type[T], arguments: Sequence[str], command: str, default: T | None = None) -> T:
    """tyro's parser, but a value the config refuses is reported as the config says it, in one line."""
    described = io.StringIO()
    try:
        with contextlib.redirect_stderr(described):
            return tyro.cli(
                options,
                args=list(arguments),
                prog=f"d2v {command}",
                default=MISSING if default is None else default,
                config=(AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, ValueError) and str(cause).startswith("config:"):
                raise UsageError(str(cause)) from None
            cause = cause.__cause__ or cause.__context__
        raise UsageError(described.getvalue().rstrip()) from None


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of `flag`, which decides the defaults that the others are parsed with."""
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def join_backends(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments with every --backend X and --backend.OP Y joined into one `option`."""
    rest: list[str] = []
    parts: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--backend")
        if name == flag or (name and not name.startswith(".")):
            rest.append(word)
            continue
        if not equals and (value := next(words, "")) == "":
            raise UsageError(f"d2v: {flag} needs the name of a backend")
        parts.append(f"{name[1:]}={value}" if name else value)
    return [*rest, option, ",".join(parts)] if parts else rest
