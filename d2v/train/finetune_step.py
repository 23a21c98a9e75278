"""One step of fine-tuning: micro-batches -> logits -> the task's loss -> clip -> AdamW with layer decay."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern._nvtx import phase

from ..config.fronts import LogMelFront, WaveformFront
from ..config.tune import FineTuneConfig
from ..data.images.augment import joined, mix, step_generator
from ..data.loader import CHANNEL_MASK, MIX, NOISE, TIME_MASK, generator, keyed
from ..data.tune import TuneData, span_mask
from ..data.types import Batch
from ..model.huggingface import naming_release
from ..model.tuned import FineTuned, build_tuned
from . import process
from .backends import check_backends, use_backends
from .checkpoint import Checkpoint
from .learner import Learner, Outcome
from .losses import ctc_loss, soft_cross_entropy
from .optim import build_optimizer, learning_rate, param_groups


@dataclass(frozen=True)
class Ready:
    """A micro-batch as the loss takes it: labels, pictures mixed, masks drawn."""

    source: Tensor
    padding_mask: Tensor | None
    labels: Any
    """[B] classes or numbers, [B,outputs] fp32 shares of classes, or the letters of each utterance"""
    frames: np.ndarray | None = None
    """ctc: [B] frames of each utterance before its padding"""
    time_mask: Tensor | None = None
    channel_mask: Tensor | None = None
    noise: Tensor | None = None
    """see `Backbone.forward`"""


class Tuner(Learner[FineTuned]):
    """Model, optimizer and the step. Seeds the global random generators with train.seed.

    What a step learns from (pictures, mixing, masks and the noise in them) depends on the step alone, not on
    train.micro_batch; dropout, drop path and layer drop are drawn forward by forward, so they do.
    """

    def __init__(self, cfg: FineTuneConfig, data: TuneData, device: torch.device) -> None:
        self.cfg, self.data = cfg, data
        check_backends(cfg.train.backend)
        process.seed_all(cfg.train.seed)
        model = build_tuned(cfg, cfg.drop).to_device(device, cfg.train.precision)
        if cfg.train.freeze_front:
            model.freeze_front()
        model.train()
        capturable = self.decides_on(device)
        groups = param_groups(model, cfg.optim, lr_scale(cfg))
        optimizer = build_optimizer(groups, cfg.optim, capturable=capturable)
        super().__init__(model, optimizer, device, capturable=capturable)

    def load(self, checkpoint: Checkpoint) -> None:
        """As `Learner.load`; of a model of transformers an error says which release made it."""
        with naming_release(self.cfg.transformers):
            super().load(checkpoint)

    def step(self, number: int, batches: list[Batch]) -> Outcome:
        """Step `number`, counted from 1; a NaN or inf in loss or gradient leaves everything as it was."""
        cfg = self.cfg
        total, samples = torch.zeros((), device=self.device), sum(map(len, batches))
        with use_backends(cfg.train.backend):
            with phase("masks"):
                ready = self.prepare(batches)
            for part in ready:
                with phase("forward"):
                    loss = self.loss(part, train_encoder=number > cfg.train.freeze_steps) / samples
                with phase("backward"):
                    loss.backward()
                total += loss.detach()
            with phase("optimizer"):
                lr = learning_rate(cfg.optim, number - 1, cfg.train.steps)
                good, norm = self.update([total], lr, cfg.optim.clip)
        return Outcome(good, {"loss": total}, norm, lr)

    def prepare(self, batches: list[Batch]) -> list[Ready]:
        """The micro-batches of a step, with what is drawn over all of them."""
        if self.cfg.head.task == "ctc":
            return self._masked(batches)
        labels = [self.data.labels(batch.host_ids) for batch in batches]
        if self.model.modality != "image":
            return [Ready(b.source, b.padding_mask, some) for b, some in zip(batches, labels, strict=True)]
        cfg = self.cfg
        draws = step_generator(cfg.train.seed, MIX, batches)
        pictures, shares = mix(
            joined([b.source for b in batches]), joined(labels), cfg.head.outputs, cfg.augment, draws
        )
        sizes = [len(batch) for batch in batches]
        parts = zip(pictures.split(sizes), shares.split(sizes), strict=True)
        return [Ready(source, None, soft) for source, soft in parts]

    def _masked(self, batches: list[Batch]) -> list[Ready]:
        """Utterances with masks over time [B,T] and channels [B,D], drawn by (seed, epoch, utterance) and
        equally large in the whole step, and with the noise that masked frames of our encoders become."""
        cfg, span, width = self.cfg, self.cfg.span, self.cfg.model.dim
        frames = [self._frames(batch) for batch in batches]
        tokens = [self._front.frames(batch.source.shape[1]) for batch in batches]
        keys = [(batch.epoch, number) for batch in batches for number in batch.host_ids.tolist()]
        time = channels = noise = None
        if span.time_prob:
            rngs = [generator(cfg.train.seed, TIME_MASK, *key) for key in keys]
            mask = span_mask(np.concatenate(frames), max(tokens), span.time_prob, span.time_length, rngs)
            time = torch.from_numpy(mask).to(self.device, non_blocking=True)
            if cfg.transformers is None:
                seed = int(step_generator(cfg.train.seed, NOISE, batches).integers(2**63))
                with keyed(seed, self.device):
                    noise = torch.randn(len(keys), int(mask[0].sum()), width, device=self.device)
        if span.channel_prob:
            rngs = [generator(cfg.train.seed, CHANNEL_MASK, *key) for key in keys]
            sides = np.full(len(keys), width)
            mask = span_mask(sides, width, span.channel_prob, span.channel_length, rngs, least=0)
            channels = torch.from_numpy(mask).to(self.device, non_blocking=True)
        ready, first = [], 0
        for batch, lengths, most in zip(batches, frames, tokens, strict=True):
            rows = slice(first, first + len(batch))
            part = Ready(
                batch.source,
                batch.padding_mask,
                self.data.labels(batch.host_ids),
                lengths,
                time_mask=None if time is None else time[rows, :most],
                channel_mask=None if channels is None else channels[rows],
                noise=None if noise is None else noise[rows],
            )
            ready.append(part)
            first = rows.stop
        return ready

    def loss(self, part: Ready, *, train_encoder: bool = True) -> Tensor:
        """0-dim fp32: the task's loss summed over the samples of a micro-batch."""
        head = self.cfg.head
        logits, _ = self.model(
            part.source, part.padding_mask, part.time_mask, part.channel_mask, part.noise,
            train_encoder=train_encoder,
        )  # fmt: skip
        if head.task == "ctc":
            assert part.frames is not None
            return ctc_loss(logits, part.frames, part.labels)
        if self.model.modality == "image":
            return soft_cross_entropy(logits, part.labels)
        if head.regression:
            return F.mse_loss(logits.squeeze(1), part.labels.float(), reduction="sum")
        smoothing = self.cfg.augment.label_smoothing
        return F.cross_entropy(logits, part.labels, reduction="sum", label_smoothing=smoothing)

    def _frames(self, batch: Batch) -> np.ndarray:
        """[B] frames of each utterance before its padding, without asking the device."""
        rows, samples = batch.source.shape
        return np.array([self._front.frames(n) for n in batch.lengths or [samples] * rows])

    @property
    def _front(self) -> WaveformFront | LogMelFront:
        front = self.cfg.model.front
        assert isinstance(front, (WaveformFront, LogMelFront))
        return front

    def report(self, outcome: Outcome) -> dict[str, Any]:
        """The numbers of a log step, read from the device."""
        loss, norm = torch.stack([outcome.losses["loss"], outcome.grad_norm]).double().tolist()
        return {"loss": loss, "grad_norm": norm, "lr": float(outcome.lr)}


_LAYER = re.compile(r"\.layers?\.(\d+)\.")
"""number of a block in the names of transformers"""


def lr_scale(cfg: FineTuneConfig) -> Callable[[str], float]:
    """Name of a parameter -> its factor on the learning rate.

    Block i of n (the prenet's come first) learns at layer_decay^(n - i) of the rate; embeddings, extra tokens
    and the head at all of it (mae_image_classification.py; goldens/finetune.json).
    """
    depth = cfg.model.prenet_depth + cfg.model.depth

    def scale(name: str) -> float:
        number = _block_number(name, cfg)
        return 1.0 if number is None else cfg.train.layer_decay ** (depth - number)

    return scale


def _block_number(name: str, cfg: FineTuneConfig) -> int | None:
    """Which block a parameter belongs to, the prenet's first; none: to no block."""
    if cfg.transformers is not None:
        layer = _LAYER.search(name)
        return int(layer[1]) if layer else None
    before, found, after = name.partition("blocks.")
    if not found or ".decoder." in name:
        return None
    number = int(after.partition(".")[0])
    return number if before.endswith("context_encoder.") else number + cfg.model.prenet_depth
