"""The run loop of pretraining and fine-tuning: how a run begins, steps, logs, saves, stops and goes on.

What differs is what a `Run` is given (trainer, data, config) and the few methods that it overrides.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from d2vkern._nvtx import phase

from ..config.atomic import write_json
from ..config.run import Config
from ..config.toml import SETTINGS, CheckpointError, is_tuned, read_settings
from ..config.tune import FineTuneConfig
from ..data.loader import leave_import
from ..data.types import Batch, DataError, Pipeline, Position
from . import process
from .capture import Capture
from .checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from .data_record import DATA, SaidOfData
from .environment import write_environment
from .learner import Learner, Outcome
from .micro_batch import amount
from .plot import plot_run
from .process import StopRequest, pick_device, tune_allocator
from .progress import Progress, read_metrics, truncate_metrics


class RunError(RuntimeError):
    """A run that had begun could not go on; the message says what to resume from."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    out: Path
    step: int
    """last step done"""
    finished: bool
    """whether all of `train.steps` are done"""
    exit_code: int
    """0: finished, or stopped on request; 1: too many bad steps in a row"""
    seconds: float
    """spent in this call"""


@dataclass
class Place:
    """Where a run stands, beside weights and random states: its part of a checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    skipped: int = 0
    """bad steps so far"""
    bad_in_a_row: int = 0
    unscored: bool = False
    """whether scoring after the last step failed: a resumed run does that first"""


P = TypeVar("P", bound=Place)
R = TypeVar("R", bound="Run[Any]")
Result = TypeVar("Result")


def device_of(cfg: Config | FineTuneConfig) -> torch.device:
    """The device of `train.device`, with the allocator set up for training on it."""
    device = pick_device(cfg.train.device)
    if device.type == "cpu":
        tune_allocator()
    return device


def begin(out: Path, make: Callable[[], R], go: Callable[[R], Result]) -> Result:
    """Claim the folder `out`, make a run in it and go; what fails before the first step leaves no folder."""
    leave_import()
    claim(out)
    run = None
    try:
        run = make()
        return go(run)
    except BaseException:
        if run is None or run.place.step == 0:
            shutil.rmtree(out, ignore_errors=True)
        raise


def claim(out: Path) -> None:
    """Make the folder of a new run; one that holds anything is refused."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"train: --out must be a folder, {out} is a file")
    if (out / SETTINGS).exists():
        command = "finetune" if is_tuned(read_settings(out)) else "train"
        raise ValueError(
            f"train: {out} holds a run already: continue it with `d2v {command} --resume {out}` "
            "or choose another --out"
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"train: {out} is not empty and holds no run: choose another --out")
    out.mkdir(parents=True, exist_ok=True)


class Run(ABC, Generic[P]):
    """One process's part of a run: trainer, data and files."""

    command: str
    """that continues it, as in `d2v COMMAND --resume OUT`"""
    unit: str
    """what speed is counted in"""

    def __init__(
        self,
        cfg: Config | FineTuneConfig,
        out: Path,
        device: torch.device,
        pipeline: Pipeline,
        learner: Learner[Any],
        step: Callable[[int, list[Batch]], Outcome],
        place: P,
        checkpoint: Checkpoint | None,
    ) -> None:
        """place: where the run stands: the start, or what `checkpoint` says, which `learner` has loaded."""
        self.cfg, self.out, self.device, self.pipeline, self.place = cfg, out, device, pipeline, place
        self._learner, self._do_step, self._said = learner, step, SaidOfData(pipeline.report)
        self._saved = None if checkpoint is None or place.unscored else checkpoint.step
        if self.too_bad:
            place.bad_in_a_row = 0  # stopped for that reason: the user wants another try
        learner.bad[0], learner.bad[1] = place.skipped, place.bad_in_a_row
        write_environment(out)
        write_json(out / DATA, self.about_data(), indent=1, default=str)
        truncate_metrics(out, place.step, scored=not place.unscored)

    @property
    @abstractmethod
    def micro(self) -> int:
        """Largest micro-batch, in the unit of `data.batch`."""

    @abstractmethod
    def opening(self) -> list[str]:
        """What is said before the first step."""

    @abstractmethod
    def log(self, outcome: Outcome, progress: Progress) -> None:
        """Log the step that was just done."""

    @abstractmethod
    def after_step(self, progress: Progress) -> None:
        """What a step may be followed by: scores of what was learned so far."""

    def progress(self) -> Progress:
        """What says how far the run is."""
        return Progress(self.out, start=self.place.step, steps=self.cfg.train.steps, unit=self.unit)

    def about_data(self) -> dict[str, Any]:
        """What data.json holds."""
        return {**asdict(self.pipeline.report), "meta": self.pipeline.meta}

    @property
    def too_bad(self) -> bool:
        """Whether the last steps were all bad, too many in a row to go on."""
        return self.place.bad_in_a_row >= self.cfg.train.max_bad_steps

    def loop(self, stop: Callable[[int], bool] | None, profiler: Capture) -> Ended:
        """Step, log and save until the end, a request to stop, or too many bad steps in a row.

        What goes wrong between steps (data that give out, scores that cannot be had) is raised when what was
        trained is saved; within a step weights and random states may be of no step at all.
        """
        began, train, place = time.perf_counter(), self.cfg.train, self.place
        unheard = profiler.check(place.step, train.steps)
        with StopRequest() as request, self.progress() as progress, profiler:
            for line in self.opening():
                progress.say(line)
            self._said.begin(progress)
            if unheard is not None:
                progress.say(f"warning: {unheard}")
            profiler.reach(place.step)
            if place.unscored:
                self._after_step(progress)
                self._save(progress)
            stream = self.pipeline.micro_batches(Position(place.epoch, place.step_in_epoch), self.micro)
            while place.step < train.steps and not self.too_bad and request.name is None:
                batches = self._next(stream, request, progress)
                if batches is None:
                    break
                self._step(batches, progress)
                profiler.reach(place.step)
                self._after_step(progress)
                if place.step % train.save_every == 0:
                    self._save(progress)
                if stop is not None and stop(place.step):
                    break
            self._save(progress)
            write_json(self.out / DATA, self.about_data(), indent=1, default=str)
            finished = place.step >= train.steps
            if self.too_bad:
                progress.say(
                    f"stopped: {place.bad_in_a_row} bad steps in a row (train.max_bad_steps); saved with the "
                    "weights of the last good step: lower optim.lr or lengthen optim.warmup in a new run"
                )
            elif not finished:
                progress.say(
                    f"stopped by {request.name or 'the caller'} at step {place.step}; saved. Continue:"
                )
                progress.say(f"  d2v {self.command} --resume {self.out}")
        if finished and read_metrics(self.out):
            plot_run(self.out)
        return Ended(self.out, place.step, finished, int(self.too_bad), time.perf_counter() - began)

    def _next(
        self, stream: Iterator[list[Batch]], request: StopRequest, progress: Progress
    ) -> list[Batch] | None:
        """The micro-batches of the next step; None when Ctrl-C took the loader's starting workers along.

        When the data give out, what was trained is saved first.
        """
        try:
            with phase("data"):
                batches = next(stream)
        except (DataError, OSError, RuntimeError) as error:
            if request.name is not None and not isinstance(error, DataError):
                return None
            if self.place.step == 0:
                raise
            self._save(progress)
            left = f"what was trained is saved: {self._resume_line()}"
            raise RunError(f"step {self.place.step + 1}: {error}\n{left}") from error
        self._said.catch_up(progress)
        return batches

    def _step(self, batches: list[Batch], progress: Progress) -> None:
        """One step and what is said about it."""
        train, place = self.cfg.train, self.place
        outcome = self._do_step(place.step + 1, batches)
        place.step += 1
        place.epoch, place.step_in_epoch = self.pipeline.position
        progress.tick(place.step, sum(amount(self.cfg.model.front, batch) for batch in batches))
        log = place.step % train.log_every == 0 or place.step == train.steps
        if log or self.device.type == "cpu":  # a GPU is asked on log steps only
            log |= self._count_bad(progress)
        if log:
            with phase("report"):
                self.log(outcome, progress)

    def _count_bad(self, progress: Progress) -> bool:
        """Bring the count of bad steps up to date; whether there are new ones."""
        before = self.place.skipped
        self.place.skipped, self.place.bad_in_a_row = self._learner.count_bad()
        new = self.place.skipped - before
        if new:
            which = "" if new == 1 and self.place.bad_in_a_row else f"{new} steps up to this one: "
            progress.say(
                f"step {self.place.step}: {which}loss or gradient is NaN or inf: skipped, nothing was updated"
            )
        return new > 0

    def _after_step(self, progress: Progress) -> None:
        """What fails here is done again by the run that is resumed."""
        try:
            self.after_step(progress)
            self.place.unscored = False
        except RunError:
            raise
        except Exception:
            self.place.unscored = True
            self._save(progress)
            progress.say(f"what was trained is saved: {self._resume_line()}")
            raise

    def _save(self, progress: Progress) -> None:
        """A checkpoint of this step, unless there is one."""
        progress.settle()
        if self._saved == self.place.step:
            return
        self.place.skipped, self.place.bad_in_a_row = self._learner.count_bad()
        states = process.capture(self.device)
        self.write(self.out, self._learner.optimizer_state(), asdict(self.place), states, self.cfg.train.keep)
        self._saved = self.place.step

    def write(
        self,
        folder: Path,
        optimizer: dict[str, dict[str, Tensor]],
        place: dict[str, Any],
        states: dict[str, Tensor],
        keep: int,
    ) -> None:
        """A checkpoint of the model as it is. RunError with what to resume from."""
        step = self.place.step
        try:
            save_checkpoint(folder, step, self._learner.model, optimizer, place, states, keep)
        except CheckpointError as error:
            raise RunError(f"step {step}: {error}; {self._resume_line()}") from error

    def _resume_line(self) -> str:
        if latest_checkpoint(self.out) is None:
            return "nothing was saved yet"
        return f"continue with `d2v {self.command} --resume {self.out}`"
