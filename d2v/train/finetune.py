"""The run of `d2v finetune`: steps, evaluation on the held-out parts, checkpoints, exact resuming.

A run directory holds config.toml, metrics.jsonl (a line per log step, and one with scores per evaluation),
env.json, checkpoints/step_N to resume from, and best/ with the weights that scored best on the first
held-out part. Random states are part of a checkpoint, so a resumed run repeats the unbroken one bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2vkern._nvtx import phase

from ..config.fronts import ImageFront
from ..config.run import Config, DataConfig
from ..config.toml import CheckpointError, read_tuned_config, write_config
from ..config.tune import FineTuneConfig
from ..data.normalisation import Normalisation, given, normalised, of_run
from ..data.tune import Part, open_tune_data
from ..data.types import Batch, DataError, Position
from ..model import Pretraining
from ..model.finite import NotFinite
from ..model.huggingface import Encoder
from ..model.tuned import Backbone, FineTuned
from . import process
from .checkpoint import (
    BEST,
    LABELS,
    Checkpoint,
    fill_model,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from .environment import write_environment
from .loop import Ended, Place, RunError, claim
from .micro_batch import UNITS, amount
from .plot import plot_run
from .process import StopRequest, pick_device, tune_allocator
from .progress import Progress, duration, read_metrics, truncate_metrics
from .tuner import Outcome, Tuner

SMALLER_IS_BETTER = ("wer", "cer", "mse")

Evaluate = Callable[[FineTuned, FineTuneConfig, Mapping[str, Part], Sequence[str]], dict[str, float]]
"""scores of held-out parts by "part/metric", the deciding one first; see `d2v.evaluate.scores.evaluate`"""


@dataclass(frozen=True)
class TuneResult(Ended):
    """How a fine-tuning run ended."""

    scores: dict[str, float]
    """of the last evaluation"""
    best: float | None
    """best value of the deciding score"""


@dataclass
class _Tuning(Place):
    best: float | None = None


def run_finetune(
    cfg: FineTuneConfig,
    encoder: str | Path,
    data: str,
    out: str | Path,
    *,
    opened: tuple[Encoder, Config, Path | None],
    evaluate: Evaluate,
    scratch: bool = False,
    stop: Callable[[int], bool] | None = None,
) -> TuneResult:
    """Fine-tune to cfg.train.steps in the run directory `out`.

    encoder: run, checkpoint folder or original `.pt` of pretraining, or `hf:FOLDER`. opened: what
    `d2v.formats.open.open_encoder` made of it. evaluate: how held-out parts are scored
    (`d2v.evaluate.scores.evaluate`). scratch: take the encoder's architecture alone.
    stop: asked after every step with its number; True saves and returns, as SIGTERM and Ctrl-C do.
    Raises ValueError (DataError), CheckpointError or FileNotFoundError for what is wrong before the first
    step, after which a new `out` is gone again, and RunError for what stops the run later.
    """
    out, device = Path(out), _prepare(cfg)
    claim(out)
    begun = None
    try:
        begun = _Run(cfg, encoder, data, out, device, evaluate, None, opened, scratch)
        return begun.loop(stop)
    except BaseException:
        if begun is None or begun.place.step == 0:
            shutil.rmtree(out, ignore_errors=True)
        raise


def resume_finetune(
    out: str | Path, *, evaluate: Evaluate, stop: Callable[[int], bool] | None = None
) -> TuneResult:
    """Go on from the newest checkpoint of the run in `out`, with its settings; see `run_finetune`.

    Raises CheckpointError where there is none.
    """
    cfg, data, encoder = read_tuned_config(out)
    newest = latest_checkpoint(out)
    if newest is None:
        raise CheckpointError(f"{out}: no checkpoint to continue from: start it anew")
    device = _prepare(cfg)
    return _Run(cfg, encoder, data, Path(out), device, evaluate, load_checkpoint(newest)).loop(stop)


def _prepare(cfg: FineTuneConfig) -> torch.device:
    device = pick_device(cfg.train.device)
    if device.type == "cpu":
        tune_allocator()
    return device


class _Run:
    """One process's part of a run: tuner, data and files."""

    def __init__(
        self,
        cfg: FineTuneConfig,
        encoder: str | Path,
        data: str,
        out: Path,
        device: torch.device,
        evaluate: Evaluate,
        checkpoint: Checkpoint | None,
        opened: tuple[Encoder, Config, Path | None] | None = None,
        scratch: bool = False,
    ) -> None:
        """checkpoint: to go on from; or opened: the encoder to begin with."""
        folder = None
        if opened is not None:
            weights, pretraining, folder = opened
            if not isinstance(weights, Pretraining):  # whose dropouts are its own
                drop = replace(cfg.drop, path=0.0)
                cfg = replace(cfg, transformers=weights.architecture, drop=drop)
            cfg = self._waves_of_encoder(cfg, pretraining.data, encoder)
            known = self._of_encoder(cfg, pretraining.data, encoder)
        else:
            known = of_run(out, cfg.model.front)
        self.out, self.device, self.evaluate = out, device, evaluate
        tuned = normalised(cfg, known)
        self.data = open_tune_data(data, tuned, device=device, encoder_dir=folder, run_dir=out)
        known = known or self.data.loader.normalisation
        cfg = replace(cfg, head=replace(cfg.head, outputs=self._outputs(cfg)))
        self.cfg = cfg
        self.tuner = Tuner(cfg, self.data, device)
        self.place = _Tuning()
        if checkpoint is not None:
            self.tuner.load(checkpoint)
            self.place = _Tuning(**checkpoint.trainer)
            if self.place.bad_in_a_row >= cfg.train.max_bad_steps:
                self.place.bad_in_a_row = 0  # stopped for that reason: the user wants another try
            self.tuner.bad[0], self.tuner.bad[1] = self.place.skipped, self.place.bad_in_a_row
        elif opened is not None and not scratch:
            start_from(self.tuner, weights, encoder)
        write_config(out, cfg, data, encoder=str(encoder), normalisation=known and known.record)
        write_environment(out)
        (out / LABELS).write_text(json.dumps(self.data.names, ensure_ascii=False) + "\n", encoding="utf-8")
        self.saved = None if checkpoint is None else checkpoint.step
        self.scores: dict[str, float] = {}
        truncate_metrics(out, self.place.step)

    def _waves_of_encoder(
        self, cfg: FineTuneConfig, pretraining: DataConfig, encoder: str | Path
    ) -> FineTuneConfig:
        """With the encoder's data.wave_norm, unless another than the usual one is asked for."""
        wanted, theirs = cfg.data.wave_norm, pretraining.wave_norm
        if wanted in (theirs, DataConfig().wave_norm) or cfg.model.modality != "audio":
            return replace(cfg, data=replace(cfg.data, wave_norm=theirs))
        print(
            f"waveforms are normalised as given, data.wave_norm {wanted}; {encoder} was trained with {theirs}"
        )
        return cfg

    def _of_encoder(
        self, cfg: FineTuneConfig, pretraining: DataConfig, encoder: str | Path
    ) -> Normalisation | None:
        """What is given, else what the encoder was trained with, where that is known."""
        front = cfg.model.front
        if not isinstance(front, ImageFront):
            return None
        wanted, theirs = (given(data, front.channels) for data in (cfg.data, pretraining))
        if wanted is None:
            return theirs and replace(theirs, origin="encoder")
        if theirs is not None and not wanted.same_as(theirs):
            print(f"pictures are normalised as given, with {wanted}; {encoder} was trained with {theirs}")
        return wanted

    def _outputs(self, cfg: FineTuneConfig) -> int:
        found = self.data.outputs
        if cfg.head.outputs and cfg.head.outputs < found:
            raise ValueError(f"finetune: head.outputs must be at least {found}, as the data have, "
                             f"got {cfg.head.outputs}")  # fmt: skip
        return cfg.head.outputs or found

    def loop(self, stop: Callable[[int], bool] | None) -> TuneResult:
        """Step, log, evaluate and save until the end, a request to stop, or too many bad steps in a row."""
        began, train, place = time.perf_counter(), self.cfg.train, self.place
        unit = UNITS[self.cfg.model.modality] if self.cfg.model.modality != "text" else "samples"
        shown = Progress(self.out, start=place.step, steps=train.steps, unit=unit, describe=describe)
        with StopRequest() as request, shown as progress:
            report = self.data.loader.report
            progress.say(f"data {report.path}: {len(self.data.loader.source):,} training samples, "
                         f"{', '.join(f'{name} {len(part):,}' for name, part in self.data.parts.items())}; "
                         f"{self.cfg.head.outputs} outputs")  # fmt: skip
            start = Position(place.epoch, place.step_in_epoch)
            stream = self.data.loader.micro_batches(start, train.micro_batch or self.cfg.data.batch)
            while place.step < train.steps and request.name is None and not self._too_bad:
                batches = self._next(stream, request)
                if batches is None:
                    break
                self._step(batches, progress)
                if place.step % train.evaluate_every == 0 or place.step == train.steps:
                    self._evaluate(progress)
                if place.step % train.save_every == 0:
                    self._save()
                if stop is not None and stop(place.step):
                    break
            self._save()
            finished = place.step >= train.steps
            if self._too_bad:
                progress.say(f"stopped: {place.bad_in_a_row} bad steps in a row (train.max_bad_steps)")
            elif not finished:
                progress.say(f"stopped at step {place.step}; saved. Continue:")
                progress.say(f"  d2v finetune --resume {self.out}")
        if finished and not self.scores:  # resumed at its end
            last = read_metrics(self.out)[-1]
            self.scores = {name: score for name, score in last.items() if "/" in name}
        if finished:
            plot_run(self.out)
        seconds = time.perf_counter() - began
        return TuneResult(
            self.out, place.step, finished, int(self._too_bad), seconds, self.scores, place.best
        )

    @property
    def _too_bad(self) -> bool:
        return self.place.bad_in_a_row >= self.cfg.train.max_bad_steps

    def _next(self, stream: Iterator[list[Batch]], request: StopRequest) -> list[Batch] | None:
        """As in pretraining: None when Ctrl-C took the loader's starting workers along."""
        try:
            with phase("data"):
                return next(stream)
        except DataError as error:
            if self.place.step == 0:
                raise
            self._save()
            raise RunError(f"step {self.place.step + 1}: {error}\n{self._resume_line()}") from error
        except (OSError, RuntimeError):
            if request.name is None:
                raise
            return None

    def _step(self, batches: list[Batch], progress: Progress) -> None:
        place, train = self.place, self.cfg.train
        outcome: Outcome = self.tuner.step(place.step + 1, batches)
        place.step += 1
        place.epoch, place.step_in_epoch = self.data.loader.position
        progress.tick(place.step, sum(amount(self.cfg.model.front, batch) for batch in batches))
        log = place.step % train.log_every == 0 or place.step == train.steps
        if log or self.device.type == "cpu":  # a GPU is asked on log steps only
            before = place.skipped
            place.skipped, place.bad_in_a_row = self.tuner.count_bad()
            if place.skipped > before:
                progress.say(
                    f"step {place.step}: loss or gradient is NaN or inf: skipped, nothing was updated"
                )
        if log:
            progress.log({"step": place.step, **self.tuner.report(outcome), "skipped": place.skipped})

    def _evaluate(self, progress: Progress) -> None:
        """Score the held-out parts; random states are left as they were."""
        began = time.perf_counter()
        self.scores = {}
        try:
            with process.preserved(self.device), phase("evaluate"):
                self.scores = self.evaluate(self.tuner.model, self.cfg, self.data.parts, self.data.names)
        except NotFinite as error:
            progress.say(f"warning: step {self.place.step}: no scores: {error}")
            progress.idle(time.perf_counter() - began)
            return
        progress.note({"step": self.place.step, **self.scores})
        said = ", ".join(f"{name} {score:.4f}" for name, score in self.scores.items())
        progress.say(f"step {self.place.step}: {said}")
        name, score = next(iter(self.scores.items()))
        if math.isfinite(score) and is_better(name, score, self.place.best):
            self.place.best = score
            self._write(self.out / BEST, {}, {"scores": self.scores}, {}, 1)
        progress.idle(time.perf_counter() - began)

    def _save(self) -> None:
        if self.saved == self.place.step:
            return
        self.place.skipped, self.place.bad_in_a_row = self.tuner.count_bad()
        state, states = self.tuner.optimizer_state(), process.capture(self.device)
        self._write(self.out, state, asdict(self.place), states, self.cfg.train.keep)
        self.saved = self.place.step

    def _write(
        self,
        folder: Path,
        optimizer: dict[str, dict[str, Tensor]],
        place: dict[str, Any],
        states: dict[str, Tensor],
        keep: int,
    ) -> None:
        """A checkpoint of the model as it is. RunError with what to resume from."""
        step, model = self.place.step, self.tuner.model
        try:
            save_checkpoint(folder, step, model, optimizer, place, states, keep)
        except CheckpointError as error:
            raise RunError(f"step {step}: {error}; {self._resume_line()}") from error

    def _resume_line(self) -> str:
        if latest_checkpoint(self.out) is None:
            return "nothing was saved yet"
        return f"continue with `d2v finetune --resume {self.out}`"


def describe(row: dict[str, Any], steps: int, unit: str, eta: float) -> str:
    """The progress line of one row of metrics."""
    return (
        f"step {row['step']:,}/{steps:,} | loss {row['loss']:.4f} | gradient {row['grad_norm']:.2f} | "
        f"lr {row['lr']:.2e} | {row['samples_per_s']:,.0f} {unit}/s | eta {duration(eta)}"
    )


def start_from(tuner: Tuner, pretrained: Encoder, source: str | Path) -> None:
    """Put a pretrained student's encoder under the head; decoder, teacher and heads stay behind."""
    backbone = tuner.model.backbone
    if not isinstance(pretrained, Pretraining):
        assert not isinstance(backbone, Backbone)
        return backbone.fill(pretrained)
    weights = {
        name: tensor for name, tensor in pretrained.state_dict().items()
        if name.startswith(("modality_encoders.", "blocks.")) and ".decoder." not in name
    }  # fmt: skip
    fill_model(backbone, weights, source)


def is_better(name: str, new: float, old: float | None) -> bool:
    """Whether a score of metric `name` beats an older one."""
    if old is None:
        return True
    return new < old if name.split("/")[-1] in SMALLER_IS_BETTER else new > old
