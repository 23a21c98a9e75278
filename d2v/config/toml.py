"""Configs as TOML: written to a run's `config.toml`, read from it, compared."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import tomli_w

from .atomic import write_text
from .fronts import FRONTS
from .run import Config
from .tune import FineTuneConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def to_dict(config: Any) -> dict[str, Any]:
    """Plain containers for TOML: no None (absent), tuples as lists, `front.kind` naming its class."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            out = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            kinds = [name for name, cls in FRONTS.items() if cls is type(value)]
            return {
                k: v for k, v in {**({"kind": kinds[0]} if kinds else {}), **out}.items() if v is not None
            }
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return value

    return plain(config)


def from_dict(cls: type, data: Any, where: str = "config") -> Any:
    """The inverse of `to_dict`. ValueError naming a key that is unknown or missing, and a value of another
    type than the field's, or that is not finite."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a table, got {data!r}")
    data = dict(data)
    if cls in FRONTS.values():
        data.pop("kind", None)
    fields, hints = dataclasses.fields(cls), get_type_hints(cls)
    known = {f.name for f in fields}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}, known: {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        here = f"{where}.{name}"
        if name == "front":
            if not isinstance(value, dict):
                raise ValueError(f"{here} must be a table, got {value!r}")
            kind = value.get("kind")
            if not isinstance(kind, str) or kind not in FRONTS:
                raise ValueError(f"{here}: kind must be one of {', '.join(sorted(FRONTS))}, got {kind!r}")
            values[name] = from_dict(FRONTS[kind], value, here)
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = from_dict(hints[name], value, here)
        else:
            values[name] = _value(hints[name], value, here)
    for f in fields:
        if f.name in values:
            continue
        if type(None) in get_args(hints[f.name]):
            values[f.name] = None  # absent because it was None, whatever the default is
        elif f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: key {f.name!r} is missing")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value as its type wants it: a list as the tuple, a whole number as the float."""
    try:
        found = msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise ValueError(f"{where} must be {_spelled(hint)}, got {value!r}") from None
    for number in found if isinstance(found, tuple) else (found,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{where} must be finite, got {value!r}")
    return found


def _spelled(hint: Any) -> str:
    """A type for people: `int or none`, `one of fp32, bf16`."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is UnionType or get_origin(hint) is Union:
        return " or ".join(map(_spelled, get_args(hint)))
    if hint is type(None):
        return "none"
    return str(hint) if get_args(hint) else str(hint.__name__)


SETTINGS = "config.toml"
C = TypeVar("C")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or trusted; the message names the file."""


def read_settings(run_dir: str | Path) -> dict[str, Any]:
    """The tables of a run's `config.toml`. Raises `CheckpointError` naming a file that is not one."""
    path = Path(run_dir) / SETTINGS
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}: not a run directory") from error
    except ValueError as error:  # TOMLDecodeError is a ValueError
        raise CheckpointError(f"{path}: {error}") from error


def is_tuned(values: dict[str, Any]) -> bool:
    """Whether the tables that `read_settings` gave are those of a fine-tuning run."""
    return isinstance(values.get("head"), dict)


def parse_settings(
    cls: type[C], run_dir: str | Path, values: dict[str, Any], *about: str
) -> tuple[C, list[str]]:
    """The config of class `cls` in what `read_settings` gave, and entries of `[run]`; `CheckpointError`."""
    try:
        found = [values["run"][name] for name in about]
        settings = {name: value for name, value in values.items() if name != "run"}
        return from_dict(cls, settings), found
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{Path(run_dir) / SETTINGS}: {error}") from error


def read_config(run_dir: str | Path) -> tuple[Config, str]:
    """The config and data path of a pretraining run; anything wrong raises `CheckpointError`."""
    values = read_settings(run_dir)
    if is_tuned(values):
        raise CheckpointError(f"{Path(run_dir) / SETTINGS}: of a fine-tuning run, not of pretraining")
    config, (data,) = parse_settings(Config, run_dir, values, "data")
    return config, data


_NEUTRAL = frozenset({
    "preset", "data.workers", "data.prefetch", "data.max_unreadable", "train.device", "train.save_every",
    "train.keep",
    "train.log_every", "train.max_bad_steps", "train.min_rank", "train.min_variance", "train.alarm_after",
    "probe.every", "probe.data", "probe.rows", "probe.layers",
})  # fmt: skip
"""settings that change neither weights nor their order of computation"""


def diff_maths(old: Config, new: Config) -> list[str]:
    """The settings that differ and change the numbers of a run, as "key: old -> new".

    `train.micro_batch` is among them: it keeps the maths, but not the order of sums.
    """
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return [
        f"{key}: {before.get(key, 'none')} -> {after.get(key, 'none')}"
        for key in sorted((before.keys() | after.keys()) - _NEUTRAL)
        if before.get(key) != after.get(key)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def write_config(run_dir: str | Path, config: Any, data: str, **about: Any) -> None:
    """Write `config.toml`: every setting; under `[run]` the data path and what else is given and not None."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    found = {name: value for name, value in about.items() if value is not None}
    text = tomli_w.dumps({"run": {"data": data, **found}, **to_dict(config)})
    write_text(Path(run_dir) / SETTINGS, text)


def read_tuned_config(run: str | Path) -> tuple[FineTuneConfig, str, str]:
    """Config, data path and encoder path of a fine-tuning run. Raises CheckpointError naming the file."""
    values = read_settings(run)
    if not is_tuned(values):
        raise CheckpointError(f"{Path(run) / SETTINGS}: not a fine-tuning run: it has no [head]")
    cfg, (data, encoder) = parse_settings(FineTuneConfig, run, values, "data", "encoder")
    return cfg, data, encoder
