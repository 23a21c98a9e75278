"""`d2v race`: accuracy against training time of several objectives on one encoder, data stream and optimizer.

Contestants take turns: each trains up to its next probe, then the next one does, so that what disturbs the
machine disturbs all of them. The clock of a contestant runs while it loads and trains, never while it is
probed. Its schedules run by that clock, from start to end of the budget, so that all have the same time.
Every objective gets its learning rate from the same few factors on the preset's, tried for a shorter budget
and judged on held-out training samples; where the best of them is the smallest or the largest, the next one
beyond is tried too. Test samples are read in the races alone.

Beside them stand the raw input, the untrained encoder, and the encoder trained on the labels from scratch
(with a linear head, on the labelled training samples alone).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config.atomic import write_json
from ..config.model import Objective
from ..config.objectives import for_objective
from ..config.run import Config
from ..data.normalisation import Normalisation, normalised
from ..data.open import open_data
from ..data.splits import divide
from ..data.types import DataError, Labelled
from ..evaluate.online_probe import probed_data
from ..evaluate.probe import probe_raw
from ..train import process
from ..train.environment import write_environment
from ..train.process import pick_device, tune_allocator
from .contestant import Contestant, Entry, flat_scores

COUNTED = "by formula (d2v.tools.flops) over the shapes of all steps"
"""how `flops_per_step` was found, as race.json says it"""

WIDER = 4
"""learning rates that a search tries beyond those it was given, at most, for each entry"""


@dataclass
class Point:
    """A contestant at one probe."""

    step: int
    seconds: float
    """of loading and training so far"""
    samples: float
    """images, text blocks, or seconds of audio that it has trained on"""
    scores: dict[str, float]
    """"linear/PART" and "knn/PART": share right; "rank": effective rank of the features"""


@dataclass
class Track:
    """What one contestant did in one race."""

    entry: Entry
    seed: int
    lr: float
    flops_per_step: int
    """of matrix products, convolutions and attention by formula (flops.py), the mean over the steps taken"""
    peak_bytes: int
    """by which memory rises during a step"""
    points: list[Point] = field(default_factory=list)


def run_race(
    cfg: Config,
    data: str,
    out: str | Path,
    *,
    objectives: Sequence[Objective],
    minutes: float,
    seeds: int,
    lr_scales: Sequence[float],
    evaluations: int,
    search_minutes: float | None = None,
    supervised: bool = True,
) -> dict[str, Any]:
    """Race `objectives` on `data`; race.json and race.png in the folder `out` are written after each race.

    cfg: the preset, as data2vec 2.0 trains it; `objectives` of it are set up by `for_objective`. Its
        probe.data and probe.rows say what is probed: all blocks side by side.
    minutes: training time of each contestant in each race; one race for each of `seeds` seeds.
    lr_scales: factors on the preset's learning rate; several are tried for search_minutes each (none: a third
        of `minutes`), and up to WIDER more of an entry whose best is the smallest or the largest.
    evaluations: probes of each contestant after that of the untrained encoder.
    Raises ValueError (DataError) before anything is trained.
    """
    out, entries = Path(out), _entries(cfg, objectives, supervised)
    if minutes <= 0 or seeds < 1 or evaluations < 1 or not lr_scales or min(lr_scales) <= 0:
        raise ValueError("race: minutes, seeds, evaluations and lr_scales must be positive")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"race: {out} exists already: choose another --out")
    device = pick_device(cfg.train.device)
    try:
        normalisation, entries, labelled = _open(cfg, entries, data, out, device)
        held_out = validation(labelled) if len(set(lr_scales)) > 1 else None
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    if device.type == "cpu":
        tune_allocator()
    environment = write_environment(out)
    rates, searched = _search(entries, data, held_out, out, lr_scales, 60 * minutes, search_minutes)
    chosen = {name: _with_lr(entry, rates[name]) for name, entry in entries.items()}
    raw = probe_raw(labelled)
    found: dict[str, Any] = {
        "schema": 1,
        "preset": cfg.preset,
        "data": data,
        "parts": [name for name in labelled.splits if name != "train"],
        "classes": len(labelled.classes),
        "level": labelled.level,
        "normalisation": normalisation and normalisation.record,
        "labelled_rows": {name: len(part) for name, part in labelled.splits.items()},
        "minutes": minutes,
        "search": searched,
        "raw": flat_scores(raw),
        "majority": raw["majority"],
        "flops": COUNTED,
        "tracks": [],
        "environment": environment,
    }
    from .race_report import plot_race, race_lines

    for seed in range(1, seeds + 1):
        print(f"race {seed} of {seeds}", flush=True)
        tracks = _race(_seeded(chosen, seed), data, labelled, out, 60 * minutes, evaluations)
        found["tracks"] += [dataclasses.asdict(track) for track in tracks]
        write_json(out / "race.json", found, indent=1)
        plot_race(found, out / "race.png")
    print("\n".join(race_lines(found)))
    print(f"written: {out / 'race.json'}, {out / 'race.png'}")
    return found


def recount(
    race: Mapping[str, Any], cfg: Config, objectives: Sequence[Objective], out: Path
) -> dict[str, Any]:
    """`race` (a race.json) with its `flops_per_step` by formula: the samples of every step are drawn again,
    and nothing is trained.

    cfg, objectives: what `run_race` was given. out: folder for a tokenizer. Where the supervised entry still
    drew from torch's generator, it is as many samples as it had, not the same ones.
    ValueError where a step has another number of samples (or seconds) than in the race: other data.
    """
    supervised = any(track["entry"] == "supervised" for track in race["tracks"])
    entries, device = _entries(cfg, objectives, supervised), pick_device(cfg.train.device)
    _, entries, labelled = _open(cfg, entries, race["data"], out, device)
    tracks = []
    for track in race["tracks"]:
        entry, seed = track["entry"], track["seed"]
        one = _seeded({entry: entries[entry]}, seed)[entry]
        contestant = Contestant(entry, one, race["data"], labelled, out)
        for point in track["points"]:
            contestant.skip(point["step"])
            if not math.isclose(contestant.samples, point["samples"], rel_tol=1e-9):
                raise ValueError(
                    f"race: {entry} of seed {seed} must have used {point['samples']} samples by step "
                    f"{point['step']}, got {contestant.samples}: these are other data or settings"
                )
        tracks.append({**track, "flops_per_step": contestant.flops_per_step})
    return {**race, "flops": COUNTED, "tracks": tracks}


def _open(
    cfg: Config, entries: dict[Entry, Config], data: str, out: Path, device: torch.device
) -> tuple[Normalisation | None, dict[Entry, Config], Labelled]:
    """How the training data are normalised, the entries with it, and what is probed."""
    normalisation = open_data(data, cfg, device=device, run_dir=out).normalisation
    entries = {name: normalised(entry, normalisation) for name, entry in entries.items()}
    return normalisation, entries, probed_data(normalised(cfg, normalisation), data, out)


def _entries(cfg: Config, objectives: Sequence[Objective], supervised: bool) -> dict[Entry, Config]:
    if not objectives or len(set(objectives)) < len(objectives):
        raise ValueError(f"race: objectives must be different ones, got {tuple(objectives)}")
    found: dict[Entry, Config] = {name: for_objective(cfg, name) for name in objectives}
    if supervised:
        views = cfg.data.batch * cfg.model.mask.clones  # as many a step as the others see
        found["supervised"] = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=views))
    return found


def _with_lr(cfg: Config, lr: float) -> Config:
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=lr))


def _seeded(entries: dict[Entry, Config], seed: int) -> dict[Entry, Config]:
    return {
        name: dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed))
        for name, cfg in entries.items()
    }


def _search(
    entries: dict[Entry, Config],
    data: str,
    held_out: Labelled | None,
    out: Path,
    scales: Sequence[float],
    budget: float,
    search_minutes: float | None,
) -> tuple[dict[Entry, float], dict[str, Any]]:
    """Each entry's learning rate, and what was tried: of `scales`, the best on held-out training samples.

    held_out: see `validation`; None: there is one scale.
    """
    scales = sorted(set(scales))
    if held_out is None:
        return {name: cfg.optim.lr * scales[0] for name, cfg in entries.items()}, {}
    seconds = budget / 3 if search_minutes is None else 60 * search_minutes
    scores: dict[Entry, dict[float, float]] = {name: {} for name in entries}

    def attempt(wanted: Mapping[Entry, float]) -> None:
        print("search: " + ", ".join(f"{name} lr x {scale:g}" for name, scale in wanted.items()), flush=True)
        tried = {name: _with_lr(entries[name], entries[name].optim.lr * x) for name, x in wanted.items()}
        for track in _race(_seeded(tried, 0), data, held_out, out, seconds, 1):
            scores[track.entry][wanted[track.entry]] = track.points[-1].scores["linear/test"]

    for scale in scales:
        attempt(dict.fromkeys(entries, scale))
    for _ in range(WIDER):
        further = {name: beyond(found) for name, found in scores.items()}
        if wider := {name: scale for name, scale in further.items() if scale is not None}:
            attempt(wider)
    best = {name: max(found, key=lambda scale: found[scale]) for name, found in scores.items()}
    rates = {name: entries[name].optim.lr * scale for name, scale in best.items()}
    return rates, {
        "seconds": seconds,
        "scores": {
            name: {f"{scale:g}": found[scale] for scale in sorted(found)} for name, found in scores.items()
        },
        "chosen": best,
    }


def beyond(scores: Mapping[float, float]) -> float | None:
    """The next factor to try, one step past the best one where that is the smallest or the largest.

    scores: of at least two factors. The step is the ratio of the two factors at that end.
    """
    tried = sorted(scores)
    best = max(tried, key=lambda scale: scores[scale])
    if best == tried[0]:
        return tried[0] * tried[0] / tried[1]
    return tried[-1] * tried[-1] / tried[-2] if best == tried[-1] else None


def validation(labelled: Labelled) -> Labelled:
    """The training part alone, a fifth of every class to test (of all samples where labels are of tokens)."""
    train, of_tokens = labelled.splits["train"], labelled.level == "token"
    numbers = divide([0 if of_tokens else int(label) for label in train.labels])
    if not len(numbers["test"]):
        raise DataError("race: no class has two training samples, one of them to judge learning rates by")
    parts = {name: train.select(keep) for name, keep in numbers.items()}
    return dataclasses.replace(labelled, splits=parts)


def _race(
    entries: dict[Entry, Config], data: str, labelled: Labelled, out: Path, budget: float, evaluations: int
) -> list[Track]:
    """One race: all entries from the start to the end of their budget, in turns."""
    running = []
    for name, cfg in entries.items():
        peak = _peak(name, cfg, data, labelled, out)
        contestant = Contestant(name, cfg, data, labelled, out, budget)
        running.append((contestant, Track(name, cfg.train.seed, cfg.optim.lr, 0, peak)))
    for number in range(evaluations + 1):
        for contestant, track in running:
            contestant.advance(budget * number / evaluations)
            scores = contestant.scores(labelled)
            track.points.append(Point(contestant.steps, contestant.seconds, contestant.samples, scores))
            track.flops_per_step = contestant.flops_per_step
            said = ", ".join(f"{key} {100 * score:.1f}" for key, score in scores.items() if "linear" in key)
            print(
                f"  {contestant.entry:<10} {contestant.seconds:>7.1f} s, step {contestant.steps:>6,}: {said}",
                flush=True,
            )
    return [track for _, track in running]


def _peak(name: Entry, cfg: Config, data: str, labelled: Labelled, out: Path) -> int:
    """Rise of memory of one step, of a contestant of its own."""
    other = Contestant(name, cfg, data, labelled, out)
    other.learner.train_step(1)  # makes the optimizer's state
    other.states = process.capture(other.device)
    return other.peak()
