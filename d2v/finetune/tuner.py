"""One step of fine-tuning: micro-batches -> logits -> the task's loss -> clip -> AdamW with layer decay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern import AdamWEMA
from d2vkern._nvtx import phase

from .. import rng
from ..backends import use_backends
from ..data import Batch
from ..data.loading import generator
from ..fronts import LogMelFront, WaveformFront
from ..learner import Learner
from ..optim import is_exempt, learning_rate
from .config import FineTuneConfig
from .data import CHANNEL_MASK, TIME_MASK, TuneData, span_mask
from .images import mix, soft_cross_entropy
from .model import FineTuned, build_tuned
from .transcripts import ctc_loss


@dataclass
class Outcome:
    """What a step leaves for the log, on the device."""

    good: Tensor
    """0-dim bool: loss and gradient were finite and the step was taken"""
    loss: Tensor
    """per sample"""
    grad_norm: Tensor
    """before clipping"""
    lr: float


class Tuner(Learner[FineTuned]):
    """Model, optimizer and the step. Seeds the global random generators with train.seed."""

    def __init__(self, cfg: FineTuneConfig, data: TuneData, device: torch.device) -> None:
        self.cfg, self.data = cfg, data
        with use_backends(cfg.train.backend):
            pass  # names are checked before anything is made
        rng.seed_all(cfg.train.seed)
        model = build_tuned(cfg, cfg.drop).to_device(device, cfg.train.precision)
        if cfg.train.freeze_front:
            model.freeze_front()
        model.train()
        capturable = device.type != "cpu"
        optimizer = AdamWEMA(
            list(param_groups(model, cfg)),
            lr=cfg.optim.lr,
            betas=cfg.optim.betas,
            eps=cfg.optim.eps,
            eps_mode=cfg.optim.eps_mode,
            capturable=capturable,
        )
        super().__init__(model, optimizer, device, capturable=capturable)

    def step(self, number: int, batches: list[Batch]) -> Outcome:
        """Step `number`, counted from 1; a NaN or inf in loss or gradient leaves everything as it was."""
        cfg = self.cfg
        total, samples = torch.zeros((), device=self.device), sum(map(len, batches))
        with use_backends(cfg.train.backend):
            for batch in batches:
                with phase("forward"):
                    loss = self.loss(batch, train_encoder=number > cfg.train.freeze_steps) / samples
                with phase("backward"):
                    loss.backward()
                total += loss.detach()
            with phase("optimizer"):
                lr = learning_rate(cfg.optim, number - 1, cfg.train.steps)
                good, norm = self.update([total], lr, cfg.optim.clip)
        return Outcome(good, total, norm, lr)

    def loss(self, batch: Batch, *, train_encoder: bool = True) -> Tensor:
        """0-dim fp32: the task's loss summed over the samples of a batch."""
        head, labels = self.cfg.head, self.data.labels(batch.host_ids)
        if head.task == "ctc":
            frames = self._frames(batch)
            masks = self._span_masks(batch, frames)
            logits, _ = self.model(batch.source, batch.padding_mask, *masks, train_encoder=train_encoder)
            return ctc_loss(logits, frames, labels)
        source, soft = batch.source, None
        if self.model.modality == "image":
            source, soft = mix(source, labels, head.outputs, self.cfg.augment)
        logits, _ = self.model(source, batch.padding_mask, train_encoder=train_encoder)
        if soft is not None:
            return soft_cross_entropy(logits, soft)
        if head.regression:
            return F.mse_loss(logits.squeeze(1), labels.float(), reduction="sum")
        smoothing = self.cfg.augment.label_smoothing
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

    def _span_masks(self, batch: Batch, frames: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        """Masks over time [B,T] and channels [B,D], drawn by (seed, epoch, utterance)."""
        span, ids = self.cfg.span, batch.host_ids.tolist()

        def draw(
            use: int, lengths: np.ndarray, size: int, prob: float, length: int, least: int
        ) -> Tensor | None:
            if not prob:
                return None
            rngs = [generator(self.cfg.train.seed, use, batch.epoch, i) for i in ids]
            mask = torch.from_numpy(span_mask(lengths, size, prob, length, rngs, least))
            return mask.to(self.device, non_blocking=True)

        longest, width = self._front.frames(batch.source.shape[1]), self.cfg.model.dim
        time = draw(TIME_MASK, frames, longest, span.time_prob, span.time_length, 1)
        channels = np.full(len(ids), width)
        return time, draw(CHANNEL_MASK, channels, width, span.channel_prob, span.channel_length, 0)

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
        loss, norm = torch.stack([outcome.loss, outcome.grad_norm]).double().tolist()
        return {"loss": loss, "grad_norm": norm, "lr": outcome.lr}


_LAYER = re.compile(r"\.layers?\.(\d+)\.")
"""number of a block in the names of transformers"""


def param_groups(model: FineTuned, cfg: FineTuneConfig) -> Iterable[dict[str, Any]]:
    """Trained parameters by learning-rate scale and weight decay.

    Block i of n (the prenet's come first) learns at layer_decay^(n - i) of the rate; embeddings, extra tokens
    and the head at all of it (mae_image_classification.py; goldens/finetune.json). Without optim.decay_all
    biases, 1-D parameters and ALiBi scales are not decayed.
    """
    depth = cfg.model.prenet_depth + cfg.model.depth
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        number = _block_number(name, cfg)
        scale = 1.0 if number is None else cfg.train.layer_decay ** (depth - number)
        exempt = not cfg.optim.decay_all and is_exempt(name, p)
        decay = 0.0 if exempt else cfg.optim.weight_decay
        groups.setdefault((scale, decay), []).append(p)
    for (scale, decay), params in groups.items():
        yield {"params": params, "lr_scale": scale, "weight_decay": decay}


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
