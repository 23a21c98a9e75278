"""Configs of the original (fairseq) as they lie in its files: plain values, checked one by one.

A config is a tree of plain containers, of OmegaConf's or a Namespace; values may be interpolations. `Section`
reads one mapping of it. What changes a model's maths and is not ours is refused by name; what has no effect
is collected in `Tree.ignored`, with the reason.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.toml import CheckpointError
from .fairseq_names import defaults
from .pt_file import LARGEST, Inert

_logger = logging.getLogger("d2v")

MISSING = "???"
"""OmegaConf's mark of a value that was never given"""


@dataclass(frozen=True)
class Tree:
    """A whole config, and what of it was ignored."""

    values: Mapping[str, Any]
    path: str | Path
    """file that errors name"""
    outer: Mapping[str, Any] | None = None
    """config of a fine-tuned file around this one, where its interpolations may lead too"""
    ignored: list[str] = field(default_factory=list)

    def resolve(self, value: Any, place: tuple[str, ...] = (), budget: Iterator[object] | None = None) -> Any:
        """Follow `${a.b.0}` from the root, or `${..a}` from `place`, the keys of its mapping, to a value."""
        found = re.fullmatch(r"\$\{(\.*)([\w.\[\]]+)\}", value) if isinstance(value, str) else None
        if not found:
            return value
        budget = iter(range(100)) if budget is None else budget
        if next(budget, None) is None:
            raise CheckpointError(f"{self.path}: {value} in its cfg leads in a circle")
        dots, steps = found[1], tuple(re.findall(r"\w+", found[2]))
        keys = (*place[: len(place) + 1 - len(dots)], *steps) if dots else steps
        for root in (self.values, self.outer):
            target: Any = root
            for depth, key in enumerate(keys):
                target = self.resolve(_child(target, key), keys[:depth], budget)
            if target is not _NOTHING:
                return target
        raise CheckpointError(f"{self.path}: {value} in its cfg leads nowhere")

    def ignore(self, what: str, why: str) -> None:
        self.ignored.append(f"{what} ({why})")

    def report(self) -> None:
        """Say in one line what was ignored."""
        if self.ignored:
            _logger.warning("%s: ignored in its cfg: %s", self.path, ", ".join(self.ignored))


_NOTHING = object()


def _child(node: Any, key: str) -> Any:
    if isinstance(node, Mapping):
        return node.get(key, _NOTHING)
    if isinstance(node, list) and key.isdigit() and int(key) < len(node):
        return node[int(key)]
    return _NOTHING


class Section:
    """One mapping of the config, read with checks; errors name the full key and the value.

    sections: whose defaults it has, by the names of `fairseq_names`. optional: one that is absent or null is
    empty. CheckpointError where another one is.
    """

    def __init__(self, tree: Tree, keys: tuple[str, ...], *sections: str, optional: bool = False) -> None:
        self.tree, self.keys, self.defaults = tree, keys, defaults(*sections)
        values: Any = tree.values
        for depth, key in enumerate(keys):
            values = tree.resolve(values.get(key), keys[:depth]) if isinstance(values, Mapping) else None
        if values is None and optional:
            values = {}
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{tree.path}: no section {'.'.join(keys)} in its cfg")
        self.values = values

    def raw(self, key: str, absent: Any = None) -> Any:
        """The value of `key` as it is, or its default, or without one `absent`."""
        default = self.defaults.get(key, absent)
        value = self.tree.resolve(self.values.get(key, default), self.keys)
        return default if isinstance(value, str) and value == MISSING else value

    def get(self, key: str) -> Any:
        """The value of `key`, in the type of its default (numbers and strings are converted)."""
        value, default = self.raw(key), self.defaults[key]
        default = 1.0 if default is None else default
        truth = isinstance(value, bool) and not isinstance(default, bool)
        if value is None or (isinstance(value, type(default)) and not truth):
            return value
        try:
            if isinstance(default, float) and not truth:
                return float(value)
            if isinstance(default, int) and not truth and int(value) == float(value):
                return int(value)
        except (TypeError, ValueError, OverflowError):
            pass
        raise self.error(key, value, f"a {type(default).__name__}")

    def error(self, key: str, value: Any, contract: str) -> CheckpointError:
        return CheckpointError(f"{self.tree.path}: {self._name(key)} is {value!r}, supported is {contract}")

    def ignore(self, key: str, why: str) -> None:
        value = self.values.get(key)
        shown = "" if isinstance(value, Mapping) else f" = {value!r}"
        self.tree.ignore(self._name(key) + shown, why)

    def _name(self, key: str) -> str:
        return ".".join((*self.keys, key))

    def require(self, switches: Mapping[str, Any], idle: Mapping[str, str] | None = None) -> None:
        """Refuse what differs from `switches`, but for the `idle` ones: key -> why it has no effect."""
        for key, accepted in switches.items():
            value = self.raw(key, accepted)
            if value != accepted:
                if key not in (idle or {}):
                    raise self.error(key, value, f"only {accepted!r}")
                assert idle is not None
                self.ignore(key, idle[key])

    def require_choice(self, key: str, names: tuple[str, ...], accepted: str, why: str = "") -> None:
        """Refuse another member of an enum, be it a name, a value (from 1) or pickled; absent ones pass."""
        value = self.raw(key)
        name = value.args[0] if isinstance(value, Inert) and value.args else value
        if isinstance(name, int) and 1 <= name <= len(names):
            name = names[name - 1]
        if name is not None and str(name).rsplit(".", 1)[-1].upper() != accepted:
            raise self.error(key, value, accepted + why)

    def ignore_unknown(self, known: Collection[str]) -> None:
        """Note what the original's own code drops as well."""
        for key in self.values:
            if key not in known:
                self.ignore(str(key), "unknown to the original")


def plain(value: Any) -> Any:
    """OmegaConf's containers and nodes, a Namespace or dataclass as plain containers; interpolations stay.

    ValueError for more than `LARGEST` values: what holds a part twice, and that one another, has no end.
    """
    left = iter(range(LARGEST))

    def made(value: Any) -> Any:
        if next(left, None) is None:
            raise ValueError(f"more than {LARGEST:,} values")
        if isinstance(value, Inert) and isinstance(value.state, dict):
            if value.name.startswith("omegaconf."):
                return made(value.state["_content" if "_content" in value.state else "_val"])
            return made(value.state)
        if isinstance(value, dict):
            return {made(key): made(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [made(item) for item in value]
        return value

    return made(value)
