"""One contestant of a race: what it trains, the clock that runs while it does, and its scores."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from d2vkern.testing import peak_memory

from ..config.model import Objective
from ..config.run import Config
from ..data.open import open_data
from ..data.types import Batch, Labelled, Position
from ..evaluate.online_probe import feature_rank
from ..evaluate.probe import features_of, probe_rows
from ..model import Pretraining
from ..model.finite import NotFinite
from ..train import process
from ..train.backends import use_backends
from ..train.micro_batch import amount, micro_batch
from ..train.pretrain_step import Trainer
from ..train.process import pick_device
from .flops import step_work
from .supervised import SupervisedTrainer, Used

Entry = Objective | Literal["supervised"]


class Learning(Protocol):
    """A model that takes steps on its own data."""

    model: Pretraining

    def train_step(self, number: int) -> Used:
        """One step by the schedules' `number`, from 1 to train.steps."""
        ...

    def skip_step(self) -> Used:
        """What the next step would use; its samples are drawn, and nothing is trained."""
        ...


class _Pretrainer:
    """Steps of a pretraining run without its files."""

    def __init__(self, cfg: Config, data: str, device: torch.device, run_dir: Path) -> None:
        pipeline = open_data(data, cfg, device=device, run_dir=run_dir)
        self.trainer = Trainer(cfg, device)
        self.model = self.trainer.model
        parameters = sum(p.numel() for p in self.trainer.parameters)
        self.stream = pipeline.micro_batches(Position(), micro_batch(cfg, device, parameters))

    def train_step(self, number: int) -> Used:
        batches = next(self.stream)
        self.trainer.step(number, batches)
        return self._used(batches)

    def skip_step(self) -> Used:
        return self._used(next(self.stream))

    def _used(self, batches: list[Batch]) -> Used:
        cfg = self.model.cfg
        samples = sum(amount(cfg.front, batch) for batch in batches)
        return Used(samples, sum(step_work(cfg, tuple(batch.source.shape)).total for batch in batches))


class Contestant:
    """One entry under one seed: trains in turns, with random states of its own.

    budget: seconds of training in all. clock: seconds since some time.
    """

    def __init__(
        self,
        entry: Entry,
        cfg: Config,
        data: str,
        labelled: Labelled,
        run_dir: Path,
        budget: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.entry, self.cfg, self.budget, self.clock = entry, cfg, budget, clock
        self.device = pick_device(cfg.train.device)
        self.learner: Learning
        if entry == "supervised":
            self.learner = SupervisedTrainer(cfg, labelled, self.device)
        else:
            self.learner = _Pretrainer(cfg, data, self.device, run_dir)
        self.states = process.capture(self.device)
        self.steps, self.seconds, self.samples, self.flops = 0, 0.0, 0.0, 0

    def advance(self, to: float) -> None:
        """Train until `to` seconds of training are over; the last step may end a little later."""
        process.restore(self.states, self.device)
        while self.seconds < to:
            began = self.clock()
            steps = self.cfg.train.steps
            number = min(steps, 1 + int(steps * self.seconds / self.budget + 1e-6))
            used = self.learner.train_step(number)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += self.clock() - began
            self._count(used)
        self.states = process.capture(self.device)

    def scores(self, labelled: Labelled) -> dict[str, float]:
        """Linear probe and neighbours of the frozen features of all blocks, and their effective rank.

        All are 0 of features that are NaN or infinite: who diverges knows nothing.
        """
        model = self.learner.model
        try:
            with use_backends(self.cfg.train.backend):
                rows = {name: features_of(model, part, layer="all") for name, part in labelled.splits.items()}
        except NotFinite as error:
            print(f"race: {self.entry} scores 0: {error}", flush=True)
            parts = [name for name in labelled.splits if name != "train"]
            return {f"{kind}/{part}": 0.0 for kind in ("linear", "knn") for part in parts} | {"rank": 0.0}
        return flat_scores(probe_rows(rows, labelled.level, ("linear", "knn"))) | {"rank": feature_rank(rows)}

    def skip(self, to: int) -> None:
        """Draw the samples of the steps up to the `to`th and count what they cost; nothing is trained."""
        process.restore(self.states, self.device)
        while self.steps < to:
            self._count(self.learner.skip_step())
        self.states = process.capture(self.device)

    def _count(self, used: Used) -> None:
        self.steps += 1
        self.samples += used.samples
        self.flops += used.flops

    @property
    def flops_per_step(self) -> int:
        """By formula, the mean over the steps so far."""
        return round(self.flops / max(1, self.steps))

    def peak(self) -> int:
        """Bytes by which memory rises during a step."""
        process.restore(self.states, self.device)
        if self.device.type != "cuda":
            return peak_memory(lambda: self.learner.train_step(1))
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.learner.train_step(1)
        return torch.cuda.max_memory_allocated(self.device) - before


def flat_scores(found: dict[str, Any]) -> dict[str, float]:
    """{"linear": {"test": x}} -> {"linear/test": x}"""
    return {f"{kind}/{part}": score for kind in ("linear", "knn") for part, score in found[kind].items()}
