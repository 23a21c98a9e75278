"""The command `d2v race`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from ..config.model import Objective
from ..config.run import Config, DataConfig, OptimConfig, ProbeConfig, TrainConfig
from ..config.unread import refuse_unread, unread_in_race
from .parse import UsageError, join_backends, leading_preset, parse, refuse_idle, shared

RIVALS: dict[str, tuple[Objective, ...]] = {
    "image": ("data2vec2", "data2vec1", "mae"),
    "audio": ("data2vec2", "data2vec1", "mae"),
    "text": ("data2vec2", "data2vec1", "mlm"),
}


@dataclass(frozen=True, kw_only=True)
class RaceOptions:
    """Accuracy against training time: `d2v race PRESET --data LABELLED --out DIR`.

    data2vec 2.0 and its rivals share encoder, data, optimizer and kernels, take turns on the machine, and are
    probed on held-out labels. Also raced: the same encoder trained on the labels alone.
    """

    path: Annotated[str | None, arg(name="data", metavar="PATH")] = None
    """labelled data set that all train on and are probed on (or probe.data)"""
    out: Annotated[str | None, arg(metavar="DIR")] = None
    """folder to make: race.json, race.png"""
    objectives: tuple[Objective, ...]
    """who races"""
    minutes: float = 6.0
    """training time of each in each race"""
    seeds: int = 3
    """races"""
    lr_scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    """factors on the preset's learning rate, tried for every objective before the races, and further out
    where the smallest or largest is its best; one: taken as it is"""
    search_minutes: float | None = None
    """training time of each trial; none: a third of --minutes"""
    evaluations: int = 10
    """probes of each contestant after that of the untrained encoder"""
    supervised: bool = True
    """race the encoder that learns the labels, too"""
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    probe: ProbeConfig


def read(arguments: Sequence[str]) -> tuple[RaceOptions, Config]:
    """The options of a race and its settings. UsageError where one is missing."""
    command, base, rest = leading_preset("race", arguments)
    defaults = RaceOptions(objectives=RIVALS[base.model.modality], **shared(base, RaceOptions))
    given = parse(RaceOptions, join_backends(rest, "--train.backend"), command, defaults)
    if given.path is None or given.out is None:
        raise UsageError(f"d2v race: {'--data PATH' if given.path is None else '--out DIR'} is missing")
    cfg = dataclasses.replace(base, **shared(given, base))
    refuse_unread("race", cfg, base, unread_in_race(cfg))
    if len(set(given.lr_scales)) == 1:
        refuse_idle("race", given, {"search_minutes": "with one of --lr-scales: nothing is searched"})
    return given, cfg


def race(arguments: Sequence[str]) -> int:
    """See `RaceOptions`."""
    given, cfg = read(arguments)
    assert given.path is not None and given.out is not None

    from ..tools.race import run_race

    run_race(
        cfg,
        given.path,
        given.out,
        objectives=given.objectives,
        minutes=given.minutes,
        seeds=given.seeds,
        lr_scales=given.lr_scales,
        search_minutes=given.search_minutes,
        evaluations=given.evaluations,
        supervised=given.supervised,
    )
    return 0
