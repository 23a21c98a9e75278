"""The run of `d2v finetune`: steps, evaluation on the held-out parts, checkpoints, exact resuming.

A run directory holds config.toml, metrics.jsonl (a line per log step, and one with scores per evaluation),
env.json, checkpoints/step_N to resume from, and best/ with the weights that scored best on the first
held-out part. Random states are part of a checkpoint, so a resumed run repeats the unbroken one bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d2vkern._nvtx import phase

from ..config.atomic import write_json
from ..config.fronts import ImageFront
from ..config.run import Config, DataConfig
from ..config.toml import CheckpointError, read_tuned_config, write_config
from ..config.tune import FineTuneConfig
from ..data.normalisation import Normalisation, given, normalised, of_run
from ..data.tune import Part, open_tune_data
from ..model import Pretraining
from ..model.finite import NotFinite
from ..model.huggingface import Encoder
from ..model.tuned import Backbone, FineTuned
from . import process
from .capture import Capture
from .checkpoint import BEST, LABELS, Checkpoint, fill_model, latest_checkpoint, load_checkpoint
from .data_record import check_same_data
from .finetune_step import Tuner
from .learner import Outcome
from .loop import Ended, Place, Run, begin, device_of
from .micro_batch import UNITS
from .progress import Progress, duration, read_metrics

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
class TuningPlace(Place):
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
    out, device = Path(out), device_of(cfg)
    return begin(
        out,
        lambda: TuningRun(cfg, encoder, data, out, device, evaluate, None, opened, scratch),
        lambda begun: begun.tune(stop),
    )


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
    run = TuningRun(cfg, encoder, data, Path(out), device_of(cfg), evaluate, load_checkpoint(newest))
    return run.tune(stop)


class TuningRun(Run[TuningPlace]):
    """See `Run`."""

    command = "finetune"

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
        tuned = normalised(cfg, known)
        self.data = open_tune_data(data, tuned, device=device, encoder_dir=folder, run_dir=out)
        loader = self.data.loader
        check_same_data(out, data, {"total": loader.report.total, **self._beside_training()})
        known = known or loader.normalisation
        cfg = replace(cfg, head=replace(cfg.head, outputs=self._outputs(cfg)))
        self.tuner = Tuner(cfg, self.data, device)
        place = TuningPlace()
        if checkpoint is not None:
            self.tuner.load(checkpoint)
            place = TuningPlace(**checkpoint.trainer)
        elif opened is not None and not scratch:
            start_from(self.tuner, weights, encoder)
        self.settings, self.evaluate = cfg, evaluate
        self.scores: dict[str, float] = {}
        self.unit = UNITS[cfg.model.modality] if cfg.model.modality != "text" else "samples"
        write_config(out, cfg, data, encoder=str(encoder), normalisation=known and known.record)
        write_json(out / LABELS, self.data.names, ensure_ascii=False)
        super().__init__(cfg, out, device, loader, self.tuner, self.tuner.step, place, checkpoint)

    def _waves_of_encoder(
        self, cfg: FineTuneConfig, pretraining: DataConfig, encoder: str | Path
    ) -> FineTuneConfig:
        """With the encoder's data.wave_norm and data.channels, unless others than the usual are asked for."""
        if cfg.model.modality != "audio":
            return cfg
        for name, done in (("wave_norm", "normalised"), ("channels", "read")):
            wanted, theirs = getattr(cfg.data, name), getattr(pretraining, name)
            if wanted in (theirs, getattr(DataConfig(), name)):
                cfg = replace(cfg, data=replace(cfg.data, **{name: theirs}))
            else:
                asked = f"waveforms are {done} as given, data.{name} {wanted}"
                print(f"{asked}; {encoder} was trained with {theirs}")
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

    def tune(self, stop: Callable[[int], bool] | None) -> TuneResult:
        """Go, and say what came of it."""
        ended = self.loop(stop, Capture(None, self.device))
        if ended.finished and not self.scores:  # resumed at its end
            last = read_metrics(self.out)[-1:]
            self.scores = {name: score for row in last for name, score in row.items() if "/" in name}
        return TuneResult(**vars(ended), scores=self.scores, best=self.place.best)

    @property
    def micro(self) -> int:
        return self.settings.train.micro_batch or self.settings.data.batch

    def progress(self) -> Progress:
        start, steps = self.place.step, self.settings.train.steps
        return Progress(self.out, start=start, steps=steps, unit=self.unit, describe=tuning_line)

    def opening(self) -> list[str]:
        parts = ", ".join(f"{name} {len(part):,}" for name, part in self.data.parts.items())
        path, count = self.pipeline.report.path, len(self.data.loader.source)
        outputs = self.settings.head.outputs
        return [f"data {path}: {count:,} training samples, {parts}; {outputs} outputs"]

    def about_data(self) -> dict[str, Any]:
        return {**super().about_data(), **self._beside_training()}

    def _beside_training(self) -> dict[str, Any]:
        """Held-out samples, and what the outputs of the head stand for."""
        return {
            "parts": {name: len(part) for name, part in self.data.parts.items()},
            "labels": self.data.names,
        }

    def log(self, outcome: Outcome, progress: Progress) -> None:
        row = self.tuner.report(outcome)
        progress.log({"step": self.place.step, **row, "skipped": self.place.skipped})

    def after_step(self, progress: Progress) -> None:
        """Score the held-out parts, where that is due; random states are left as they were."""
        step, train = self.place.step, self.settings.train
        if step % train.evaluate_every and step != train.steps:
            return
        self.scores = {}
        with progress.paused():
            try:
                with process.preserved(self.device), phase("evaluate"):
                    model, parts, names = self.tuner.model, self.data.parts, self.data.names
                    self.scores = self.evaluate(model, self.settings, parts, names)
            except NotFinite as error:
                progress.say(f"warning: step {step}: no scores: {error}")
                return
            progress.note({"step": step, **self.scores})
            said = ", ".join(f"{name} {score:.4f}" for name, score in self.scores.items())
            progress.say(f"step {step}: {said}")
            name, score = next(iter(self.scores.items()))
            if math.isfinite(score) and is_better(name, score, self.place.best):
                self.place.best = score
                self.write(self.out / BEST, {}, {"scores": self.scores}, {}, 1)


def tuning_line(row: dict[str, Any], steps: int, unit: str, eta: float) -> str:
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
    fill_model(backbone, pretrained.encoder_tensors(), source)


def is_better(name: str, new: float, old: float | None) -> bool:
    """Whether a score of metric `name` beats an older one."""
    if old is None:
        return True
    return new < old if name.split("/")[-1] in SMALLER_IS_BETTER else new > old
