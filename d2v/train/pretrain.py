"""Pretraining: `run` is what `d2v train` calls and the trainer's Python API.

Everything random is keyed by seed, epoch and sample or is part of the checkpoint, so a run that was
stopped at any step and resumed repeats the unbroken one bit for bit, `metrics.jsonl` included.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from d2vkern._nvtx import phase

from ..config.run import Config
from ..config.toml import CheckpointError, diff_maths, read_config, write_config
from ..data.normalisation import Normalisation, normalised, of_run
from ..data.open import open_data
from ..data.types import Batch, DataError, Pipeline, Position
from ..model import Pretraining
from . import process
from .capture import Capture
from .checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from .environment import write_environment
from .health import Alarm, AlarmLog
from .loop import Ended, Place, RunError, claim
from .micro_batch import UNITS, amount, equation, micro_batch
from .plot import plot_run
from .process import StopRequest, pick_device, tune_allocator
from .progress import Progress, read_metrics, truncate_metrics
from .step import Trainer


@dataclass(frozen=True)
class Scores:
    """What one probe found."""

    row: dict[str, float]
    """for metrics.jsonl: "probe/PART/KIND" and "feature_rank"; of several layers "probe/layerN/PART/KIND" and
    "feature_rank_layerN" """
    line: str
    """the same for people"""


MOST_NAMED = 20
"""unreadable samples named while running"""


class Probe(Protocol):
    """What scores the encoder while it is pretrained; `d2v.evaluate.online_probe.OnlineProbe` is one."""

    def run(self, model: Pretraining) -> Scores: ...


MakeProbe = Callable[[Config, str, Path], Probe]
"""from the config, with the normalisation of the training pictures, the run's data and its directory"""


@dataclass(frozen=True)
class RunResult(Ended):
    """How a pretraining run ended."""

    metrics: list[dict[str, Any]]
    """the lines of metrics.jsonl"""


@dataclass
class _Pretraining(Place):
    micro_batch: int = 0
    """kept over a resume: another split of the batch rounds differently"""


def run(
    cfg: Config,
    data: str,
    out: str | Path,
    *,
    resume: bool = False,
    stop: Callable[[int], bool] | None = None,
    capture: tuple[int, int] | None = None,
    probe: MakeProbe | None = None,
) -> RunResult:
    """Train to `cfg.train.steps` in the run directory `out`.

    data: folder, file, tar or embedded data set; on resume it may have moved.
    resume: go on from the newest checkpoint of `out`, with the same maths.
    stop: asked after every step with its number; True saves and returns, as SIGTERM and Ctrl-C do.
    capture: (start, stop): tell the CUDA profiler when `start` steps are done and when `stop` are.
    probe: makes the probe that `cfg.probe` asks for: `d2v.evaluate.online_probe.OnlineProbe`.

    Seeds the global random generators. Raises ValueError (and its kin DataError), CheckpointError or
    FileNotFoundError for what is wrong before the first step, after which a new `out` is gone again, and
    RunError for what stops the run later.
    """
    if cfg.probe.every and probe is None:
        raise ValueError(
            f"train: probe.every must be 0 without a probe (probe=d2v.evaluate.online_probe.OnlineProbe), "
            f"got {cfg.probe.every}"
        )
    out, device = Path(out), pick_device(cfg.train.device)
    profiler = Capture(capture, device)
    if device.type == "cpu":
        tune_allocator()
    if resume:
        checkpoint = _newest(cfg, out)
        resumed = _Run(cfg, data, out, device, checkpoint, probe, of_run(out, cfg.model.front))
        return resumed.loop(stop, profiler)
    claim(out)
    begun = None
    try:
        write_config(out, cfg, data)
        begun = _Run(cfg, data, out, device, None, probe)
        return begun.loop(stop, profiler)
    except BaseException:
        if begun is None or begun.place.step == 0:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _newest(cfg: Config, out: Path) -> Checkpoint | None:
    """The checkpoint to resume from; None when the run was killed before its first one.

    ValueError listing every setting that would change the maths of the run.
    """
    if changed := diff_maths(read_config(out)[0], cfg):
        listed = "\n".join(f"  {line}" for line in changed)
        raise ValueError(f"train: {out} can only be resumed with the same maths; changed:\n{listed}")
    newest = latest_checkpoint(out)
    return None if newest is None else load_checkpoint(newest)


class _Run:
    """One process's part of a run: trainer, data and files."""

    def __init__(
        self,
        cfg: Config,
        data: str,
        out: Path,
        device: torch.device,
        checkpoint: Checkpoint | None,
        probe: MakeProbe | None,
        known: Normalisation | None = None,
    ) -> None:
        """known: how the run that is resumed normalises its pictures."""
        self.cfg, self.out, self.device = cfg, out, device
        self.pipeline: Pipeline = open_data(data, normalised(cfg, known), device=device, run_dir=out)
        self._check_same_data(data)
        self.normalisation = known or self.pipeline.normalisation
        self.probe: Probe | None = None
        if cfg.probe.every and probe is not None:
            self.probe = probe(normalised(cfg, self.normalisation), data, out)
        write_environment(out)
        self.trainer = Trainer(cfg, device)  # seeds, so after the imports of `open_data`: some draw numbers
        if checkpoint is None:
            parameters = sum(p.numel() for p in self.trainer.parameters)
            self.place = _Pretraining(micro_batch=micro_batch(cfg, device, parameters))
        else:
            self.trainer.load(checkpoint)
            self.place = _Pretraining(**checkpoint.trainer)
            if self.place.bad_in_a_row >= cfg.train.max_bad_steps:
                self.place.bad_in_a_row = 0  # stopped for that reason: the user wants another try
            self.trainer.bad[0], self.trainer.bad[1] = self.place.skipped, self.place.bad_in_a_row
        self.saved = None if checkpoint is None else checkpoint.step
        self.alarm_log = AlarmLog()
        self.named = 0
        write_config(out, cfg, data, normalisation=self.normalisation and self.normalisation.record)
        self._record_data()
        truncate_metrics(out, self.place.step)

    @property
    def too_bad(self) -> bool:
        """Whether the last steps were all bad, too many in a row to go on."""
        return self.place.bad_in_a_row >= self.cfg.train.max_bad_steps

    def loop(self, stop: Callable[[int], bool] | None, profiler: Capture) -> RunResult:
        """Step, log and save until the end, a request to stop, or too many bad steps in a row."""
        began, cfg, place = time.perf_counter(), self.cfg.train, self.place
        unheard = profiler.check(place.step, cfg.steps)
        unit = UNITS[self.cfg.model.modality]
        with (
            StopRequest() as request,
            Progress(self.out, start=place.step, steps=cfg.steps, unit=unit) as progress,
            profiler,
        ):
            report = self.pipeline.report
            progress.say(f"data {report.path}: {report.total:,} samples, skipped: {report.skipped or 'none'}")
            self._name_unreadable(progress)
            progress.say(equation(self.cfg, place.micro_batch))
            if unheard is not None:
                progress.say(f"warning: {unheard}")
            profiler.reach(place.step)
            start = Position(place.epoch, place.step_in_epoch)
            stream = self.pipeline.micro_batches(start, place.micro_batch)
            while place.step < cfg.steps and not self.too_bad and request.name is None:
                batches = self._next(stream, request, progress)
                if batches is None:
                    break
                self._step(batches, progress)
                profiler.reach(place.step)
                if self.probe is not None and (
                    place.step % self.cfg.probe.every == 0 or place.step == cfg.steps
                ):
                    self._probe(self.probe, progress)
                if place.step % cfg.save_every == 0:
                    progress.settle()
                    self._save()
                if stop is not None and stop(place.step):
                    break
            progress.settle()
            self._save()
            self._record_data()
            finished = place.step >= cfg.steps
            if self.too_bad:
                progress.say(
                    f"stopped: {place.bad_in_a_row} bad steps in a row (train.max_bad_steps); saved with the "
                    "weights of the last good step: lower optim.lr or lengthen optim.warmup in a new run"
                )
            elif not finished:
                progress.say(
                    f"stopped by {request.name or 'the caller'} at step {place.step}; saved. Continue:"
                )
                progress.say(f"  d2v train --resume {self.out}")
        rows = read_metrics(self.out)
        if finished and rows:
            plot_run(self.out)
        return RunResult(self.out, place.step, finished, int(self.too_bad), time.perf_counter() - began, rows)

    def _next(
        self, stream: Iterator[list[Batch]], request: StopRequest, progress: Progress
    ) -> list[Batch] | None:
        """The micro-batches of the next step; None when Ctrl-C took the loader's starting workers along.

        When the data give out, what was trained is saved first.
        """
        try:
            with phase("data"):
                batches = next(stream)
        except DataError as error:
            if self.place.step == 0:
                raise
            self._save()
            left = f"what was trained is saved: {self._resume_line()}"
            raise RunError(f"step {self.place.step + 1}: {error}\n{left}") from error
        except (OSError, RuntimeError):
            if request.name is None:
                raise
            return None
        self._name_unreadable(progress)
        return batches

    def _name_unreadable(self, progress: Progress) -> None:
        """Say once which samples cannot be read; data.json lists them all."""
        unreadable = self.pipeline.report.unreadable
        for name in list(unreadable)[self.named : MOST_NAMED]:
            progress.say(f"warning: {name} cannot be read, it is left out: {unreadable[name]}")
        if self.named <= MOST_NAMED < len(unreadable):
            progress.say("warning: further unreadable samples are listed in data.json only")
        self.named = len(unreadable)

    def _check_same_data(self, data: str) -> None:
        """A data set may have moved since the run began, but its samples are known by their number."""
        record = self.out / "data.json"
        if not record.exists():
            return
        before = json.loads(record.read_text(encoding="utf-8"))["total"]
        if before != self.pipeline.report.total:
            raise ValueError(
                f"train: {data} holds {self.pipeline.report.total} samples, {self.out} was begun with "
                f"{before}: it can only be resumed on the same data"
            )

    def _record_data(self) -> None:
        """`data.json`: what the data set holds, what was skipped and why, and what was measured on it."""
        record = {**asdict(self.pipeline.report), "meta": self.pipeline.meta}
        (self.out / "data.json").write_text(
            json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8"
        )

    def _step(self, batches: list[Batch], progress: Progress) -> None:
        """One step and what is said about it."""
        cfg, place = self.cfg.train, self.place
        outcome = self.trainer.step(place.step + 1, batches)
        place.step += 1
        place.epoch, place.step_in_epoch = self.pipeline.position
        progress.tick(place.step, sum(amount(self.cfg.model.front, batch) for batch in batches))
        log = place.step % cfg.log_every == 0 or place.step == cfg.steps
        if log or self.device.type == "cpu":  # a GPU is asked on log steps only
            log |= self._count_bad(progress)
        if log:
            with phase("report"):
                row, health = self.trainer.report(place.step, outcome)
            progress.log(row, partial(self._health, health, place.step, place.skipped))

    def _health(
        self, health: Callable[[], tuple[dict[str, Any], list[Alarm]]], step: int, skipped: int
    ) -> tuple[dict[str, Any], list[str]]:
        """The rest of the line of a step, and what is said below it; called beside the next steps."""
        columns, alarms = health()
        warnings = [f"warning: step {step}: {alarm.message}" for alarm in self.alarm_log.fresh(alarms)]
        return {**columns, "skipped": skipped}, warnings

    def _probe(self, probe: Probe, progress: Progress) -> None:
        """Score the frozen encoder and say so."""
        began = time.perf_counter()
        found = probe.run(self.trainer.model)
        if found.row:
            progress.note({"step": self.place.step, **found.row})
        progress.say(f"step {self.place.step}: probe {found.line}")
        progress.pinned = f" | probe {found.line}"
        progress.idle(time.perf_counter() - began)

    def _count_bad(self, progress: Progress) -> bool:
        """Bring the count of bad steps up to date; whether there are new ones."""
        before = self.place.skipped
        self.place.skipped, self.place.bad_in_a_row = self.trainer.count_bad()
        new = self.place.skipped - before
        if new:
            which = "" if new == 1 and self.place.bad_in_a_row else f"{new} steps up to this one: "
            progress.say(
                f"step {self.place.step}: {which}loss or gradient is NaN or inf: skipped, nothing was updated"
            )
        return new > 0

    def _save(self) -> None:
        if self.saved == self.place.step:
            return
        self.place.skipped, self.place.bad_in_a_row = self.trainer.count_bad()
        try:
            save_checkpoint(
                self.out,
                self.place.step,
                self.trainer.model,
                self.trainer.optimizer_state(),
                asdict(self.place),
                process.capture(self.device),
                self.cfg.train.keep,
            )
        except CheckpointError as error:
            raise RunError(f"step {self.place.step}: {error}; {self._resume_line()}") from error
        self.saved = self.place.step

    def _resume_line(self) -> str:
        if latest_checkpoint(self.out) is None:
            return "nothing was saved yet"
        return f"continue with `d2v train --resume {self.out}`"
