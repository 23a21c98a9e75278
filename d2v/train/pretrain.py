"""Pretraining: `run` is what `d2v train` calls and the trainer's Python API.

Everything random is keyed by seed, epoch and sample or is part of the checkpoint, so a run that was
stopped at any step and resumed repeats the unbroken one bit for bit, `metrics.jsonl` included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..config.run import Config
from ..config.toml import diff_maths, read_config, write_config
from ..data.normalisation import Normalisation, normalised, of_run
from ..data.open import open_data
from ..model import Pretraining
from .capture import Capture
from .checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from .data_record import check_same_data
from .health import Alarm, AlarmLog
from .learner import Outcome
from .loop import Ended, Place, Run, begin, device_of
from .micro_batch import UNITS, equation, micro_batch
from .pretrain_step import Trainer
from .progress import Progress, read_metrics


@dataclass(frozen=True)
class Scores:
    """What one probe found."""

    row: dict[str, float]
    """for metrics.jsonl: "probe/PART/KIND" and "feature_rank"; of several layers "probe/layerN/PART/KIND" and
    "feature_rank_layerN" """
    line: str
    """the same for people"""


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
class PretrainingPlace(Place):
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
    out, device = Path(out), device_of(cfg)
    profiler = Capture(capture, device)
    if resume:
        checkpoint = _newest(cfg, out)
        resumed = PretrainingRun(cfg, data, out, device, checkpoint, probe, of_run(out, cfg.model.front))
        ended = resumed.loop(stop, profiler)
    else:

        def new() -> PretrainingRun:
            write_config(out, cfg, data)
            return PretrainingRun(cfg, data, out, device, None, probe)

        ended = begin(out, new, lambda begun: begun.loop(stop, profiler))
    return RunResult(**vars(ended), metrics=read_metrics(out))


def _newest(cfg: Config, out: Path) -> Checkpoint | None:
    """The checkpoint to resume from; None when the run was killed before its first one.

    ValueError listing every setting that would change the maths of the run.
    """
    if changed := diff_maths(read_config(out)[0], cfg):
        listed = "\n".join(f"  {line}" for line in changed)
        raise ValueError(f"train: {out} can only be resumed with the same maths; changed:\n{listed}")
    newest = latest_checkpoint(out)
    return None if newest is None else load_checkpoint(newest)


class PretrainingRun(Run[PretrainingPlace]):
    """See `Run`."""

    command = "train"

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
        pipeline = open_data(data, normalised(cfg, known), device=device, run_dir=out)
        check_same_data(out, data, {"total": pipeline.report.total})
        normalisation = known or pipeline.normalisation
        self._probe: Probe | None = None
        if cfg.probe.every and probe is not None:
            self._probe = probe(normalised(cfg, normalisation), data, out)
        self.trainer = Trainer(cfg, device)  # seeds, so after the imports of `open_data`: some draw numbers
        if checkpoint is None:
            parameters = sum(p.numel() for p in self.trainer.parameters)
            place = PretrainingPlace(micro_batch=micro_batch(cfg, device, parameters))
        else:
            self.trainer.load(checkpoint)
            place = PretrainingPlace(**checkpoint.trainer)
        self.settings, self.unit, self._alarms = cfg, UNITS[cfg.model.modality], AlarmLog()
        write_config(out, cfg, data, normalisation=normalisation and normalisation.record)
        super().__init__(cfg, out, device, pipeline, self.trainer, self.trainer.step, place, checkpoint)

    @property
    def micro(self) -> int:
        return self.place.micro_batch

    def opening(self) -> list[str]:
        report = self.pipeline.report
        skipped = sum(map(len, report.skipped.values()))
        return [
            f"data {report.path}: {report.total:,} samples, {skipped:,} skipped",
            equation(self.settings, self.place.micro_batch),
        ]

    def log(self, outcome: Outcome, progress: Progress) -> None:
        row, health = self.trainer.report(self.place.step, outcome)
        progress.log(row, partial(self._health, health, self.place.step, self.place.skipped))

    def _health(
        self, health: Callable[[], tuple[dict[str, Any], list[Alarm]]], step: int, skipped: int
    ) -> tuple[dict[str, Any], list[str]]:
        """The rest of the line of a step, and what is said below it; called beside the next steps."""
        columns, alarms = health()
        warnings = [f"warning: step {step}: {alarm.message}" for alarm in self._alarms.fresh(alarms)]
        return {**columns, "skipped": skipped}, warnings

    def after_step(self, progress: Progress) -> None:
        """Score the frozen encoder and say so, where that is due."""
        step = self.place.step
        if self._probe is None or (step % self.settings.probe.every and step != self.settings.train.steps):
            return
        with progress.paused():
            found = self._probe.run(self.trainer.model)
            if found.row:
                progress.note({"step": step, **found.row})
            progress.say(f"step {step}: probe {found.line}")
            progress.pinned = f" | probe {found.line}"
