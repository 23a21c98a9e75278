"""What the commands share: tyro's parser with errors in one line, and the arguments many of them take."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro import MISSING_NONPROP as MISSING
from tyro.conf import AvoidSubcommands, Positional, arg

from ..config.presets import PRESETS, preset
from ..config.run import Config

T = TypeVar("T")
Model = Annotated[Positional[str], arg(metavar="RUN")]
DataPath = Annotated[str, arg(metavar="PATH")]
TextColumn = Annotated[str | None, arg(name="data.text-column", metavar="NAME")]
LabelColumn = Annotated[str | None, arg(name="data.label-column", metavar="NAME")]
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


def leading(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The word in front of the options, if there is one, and the options."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def leading_preset(
    command: str, arguments: Sequence[str], instead: str = ""
) -> tuple[str, Config, Sequence[str]]:
    """The command with the preset in front of the options, the preset, and the options.

    Only `--help` goes without one. instead: what else the command could begin with.
    """
    name, rest = leading(arguments)
    if name is None and {"-h", "--help"}.isdisjoint(rest):
        known = ", ".join(PRESETS)
        raise UsageError(f"d2v {command}: the preset is missing{instead}; presets: {known}")
    return f"{command} {name or 'PRESET'}", preset(name or "image_tiny"), rest


def shared(source: Any, target: Any) -> dict[str, Any]:
    """The fields of the dataclass `source` that `target`, one too, also has."""
    names = {f.name for f in dataclasses.fields(target)}
    return {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name in names}


def refuse_idle(command: str, given: Any, unread: dict[str, str]) -> None:
    """UsageError for an option that is given and not read. unread: its field -> why."""
    defaults = {f.name: f.default for f in dataclasses.fields(given)}
    for name, reason in unread.items():
        if getattr(given, name) != defaults[name]:
            raise UsageError(f"d2v {command}: --{name.replace('_', '-')} has no effect {reason}")


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
