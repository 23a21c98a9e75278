"""The baseline of races: the encoder learns the labels from scratch, a linear head on top.

Labels of samples are read from the mean over tokens, labels of tokens from each of them. Optimizer, schedule
and precision are the preset's; samples come without augmentation, as probes see them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.run import Config
from ..data.loader import ORDER, generator
from ..data.types import Labelled
from ..model import Pretraining, build_model
from ..model.blocks import PRECISIONS, linear
from ..model.feature_encoder import padding_of, token_lengths
from ..model.pool import mean_over_tokens
from ..train import process
from ..train.backends import use_backends
from ..train.learner import Learner
from ..train.optim import build_optimizer, learning_rate, param_groups
from .flops import supervised_work


class Used(NamedTuple):
    """What a step took."""

    samples: float
    """pictures, texts or blocks of them, seconds of audio, or whole utterances"""
    flops: int
    """by formula (flops.py)"""


class Supervised(nn.Module):
    """An encoder of the preset and a head for `classes`."""

    def __init__(self, cfg: Config, classes: int) -> None:
        super().__init__()
        begun = build_model(cfg.model).state_dict()  # as data2vec 2.0 begins, whose decoder and teacher go
        with process.preserved(torch.device("cpu")):
            self.encoder = Pretraining(cfg.model)
        self.encoder.load_state_dict({name: begun[name] for name in self.encoder.state_dict()})
        self.head = nn.Linear(cfg.model.dim, classes)

    def forward(self, source: Tensor, padding_mask: Tensor | None, labels: Tensor) -> Tensor:
        """Mean cross-entropy; labels [B] or, with -1 where there is none, [B,T]."""
        encoder, cfg = self.encoder, self.encoder.cfg
        samples, lengths = token_lengths(cfg.front, source, padding_mask)
        local = encoder.encoder.local(source, samples, encoder.compute_dtype)
        x, context = encoder.encoder.contextualise(local, None, lengths)
        x = encoder.student(x, context)[:, cfg.front.extra_tokens :]
        if labels.ndim == 1:
            x = mean_over_tokens(x, padding_of(lengths, x.shape[1]))
        return F.cross_entropy(linear(x, self.head).flatten(0, -2).float(), labels.flatten(), ignore_index=-1)


class SupervisedTrainer:
    """Steps on random samples of the labelled training part, `data.batch` of them (audio: utterances that
    last about as many seconds).
    """

    def __init__(self, cfg: Config, labelled: Labelled, device: torch.device) -> None:
        process.seed_all(cfg.train.seed)
        self.cfg, self.device = cfg, device
        module = Supervised(cfg, len(labelled.classes)).to(device)
        self.model: Pretraining = module.encoder
        self.model.compute_dtype = PRECISIONS[cfg.train.precision]
        module.train()
        capturable = Learner.decides_on(device)
        optimizer = build_optimizer(param_groups(module, cfg.optim), cfg.optim, capturable=capturable)
        self.learner = Learner(module, optimizer, device, capturable=capturable)
        size = max(1, round(cfg.data.batch / cfg.sample_units))
        train = labelled.splits["train"]
        self.stream = train.drawn(self._choices(len(train), size))

    def train_step(self, number: int) -> Used:
        """One step by the schedules' `number`, from 1."""
        source, padding, labels = next(self.stream)
        lr = learning_rate(self.cfg.optim, number - 1, self.cfg.train.steps)
        with use_backends(self.cfg.train.backend):
            padding = None if padding is None else padding.to(self.device)
            loss = self.learner.model(source.to(self.device), padding, labels.to(self.device))
            loss.backward()
            self.learner.update([loss.detach()], lr, self.cfg.optim.clip)
        return self._used(source, labels)

    def skip_step(self) -> Used:
        """What the next step would use; its samples are drawn, and nothing is trained."""
        source, _, labels = next(self.stream)
        return self._used(source, labels)

    def _choices(self, count: int, size: int) -> Iterator[np.ndarray]:
        """Sample numbers [B] of each step, ascending, drawn by (seed, step): workers read ahead."""
        for step in itertools.count():
            order = generator(self.cfg.train.seed, ORDER, step).permutation(count)
            yield np.sort(order[:size])

    def _used(self, source: Tensor, labels: Tensor) -> Used:
        classes = self.learner.model.head.out_features
        shape, per_token = tuple(source.shape), labels.ndim > 1
        flops = supervised_work(self.cfg.model, shape, classes, per_token=per_token).total
        return Used(len(source), flops)
