"""The commands `d2v check`, `d2v presets` and `d2v plot`: a look at data, presets and runs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ..config.presets import PRESETS, preset
from .parse import DataPath, Model, TextColumn, UsageError, parse, refuse_idle

if TYPE_CHECKING:
    from ..data.types import Report


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Read a data set once: counts, sizes, histograms, every unreadable file.

    Exits with 1 when training would refuse it.
    """

    data: DataPath
    """folder, file, tar or embedded data set"""
    preset: Annotated[str | None, arg(metavar="NAME")] = None
    """whose front end reads the data (channels, sample rate, tokenizer)"""
    modality: Literal["image", "audio", "text"] | None = None
    """in place of a preset: the published base preset of this modality, whose batch may be larger than the
    data set; none: what most files are"""
    text_column: TextColumn = None
    """of texts: key or column of the text; none: text"""
    verbose: bool = False
    """name every file that is not used, not three of each kind"""
    json: bool = False
    """print what was found as one JSON object"""


def check(arguments: Sequence[str]) -> int:
    """See `CheckOptions`."""
    given = parse(CheckOptions, arguments, "check")
    if given.preset is not None:
        refuse_idle("check", given, {"modality": "with --preset"})
    embedded = {"digits": "image_tiny", "speech": "audio_tiny", "text": "text_tiny"}
    from ..data.open import check_data, guess_modality

    name = given.preset or (None if given.modality else embedded.get(given.data))
    cfg = preset(name or f"{given.modality or guess_modality(given.data)}_base")
    if given.text_column is not None:
        if cfg.model.modality != "text":
            raise UsageError(f"d2v check: --data.text-column has no effect for {cfg.model.modality}")
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, text_column=given.text_column))
    report = check_data(given.data, cfg, any_batch=not name)  # without a preset no size is meant
    if given.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        _print_report(report, given.verbose)
    return int(bool(report.refused))


def _print_report(report: Report, verbose: bool) -> None:
    from ..data.types import EXAMPLES

    skipped, unreadable = sum(map(len, report.skipped.values())), len(report.unreadable)
    print(
        f"{report.path}: {report.total:,} samples, {report.total - skipped - unreadable:,} usable, "
        f"{unreadable:,} unreadable, {skipped:,} skipped"
    )
    for name, value in report.facts.items():
        print(f"  {name}: {value}")
    for line in (*report.notes, *report.lines(sys.maxsize if verbose else EXAMPLES)):
        print(f"  {line}")
    if report.refused:
        print(f"training would stop: {report.refused}")


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """List the presets, or print every value of one with its source."""

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """a preset"""


def presets(arguments: Sequence[str]) -> int:
    """See `PresetsOptions`."""
    name = parse(PresetsOptions, arguments, "presets").name
    if name is None:
        width = max(map(len, PRESETS))
        for key, make in PRESETS.items():
            print(f"{key:<{width}}  {(inspect.getdoc(make) or '').splitlines()[0]}")
        return 0
    cfg = preset(name)
    print(f"{name}: {inspect.getdoc(PRESETS[name])}\n")
    print(
        "* set by the preset, from the source named above; the others are the defaults of d2v/config/run.py:"
    )
    print("  for model, optim and ema fairseq's (examples/data2vec/models/data2vec2.py, modalities/*.py)\n")
    for key, value, changed in _values(cfg):
        print(f"{'*' if changed else ' '} {key} = {value!r}")
    return 0


def _values(section: Any, prefix: str = "") -> list[tuple[str, Any, bool]]:
    """(dotted key, value, whether it differs from the dataclass default) of every leaf."""
    rows: list[tuple[str, Any, bool]] = []
    for f in dataclasses.fields(section):
        value, key = getattr(section, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            if key == "model.front":
                rows.append((key, type(value).__name__, True))
            rows += _values(value, f"{key}.")
        elif key != "preset":
            rows.append((key, value, value != f.default))
    return rows


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw RUN/plots/*.png from RUN/metrics.jsonl."""

    run: Model
    """run directory"""


def plot(arguments: Sequence[str]) -> int:
    """See `PlotOptions`."""
    run = parse(PlotOptions, arguments, "plot").run

    from ..train.plot import plot_run

    for path in plot_run(run):
        print(path)
    return 0
