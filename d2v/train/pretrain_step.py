"""One global step: micro-batches -> masks -> forward and backward of each -> clip -> AdamW + EMA.

The gradient is that of (sum of all losses) / (masked tokens of the global batch), as in the original,
so it does not depend on the micro-batch. Nothing in a step waits for a GPU: what the host wants to know
stays on the device until somebody asks (`Trainer.report`, `Trainer.count_bad`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from d2vkern._nvtx import phase

from ..config.run import Config
from ..data.types import Batch
from ..model import Pretraining, build_model
from ..model.blocks import PRECISIONS
from ..model.compile import compile_regions
from . import process
from .backends import check_backends, use_backends
from .checkpoint import Checkpoint
from .cuda_graph import CudaCapture, StepGraphs
from .health import Alarm, judge, measure
from .learner import Learner, Outcome
from .optim import build_optimizer, learning_rate, param_groups, teacher_decay


class Trainer(Learner[Pretraining]):
    """Model, optimizer and the global step; knows nothing of files, signals or terminals.

    capturable: take decisions on the device, reading nothing there; None: see `decides_on`.
    Seeds the global random generators with `train.seed`. ValueError for train.cuda_graph without a GPU and
    for backends that are not known.
    """

    def __init__(self, cfg: Config, device: torch.device, *, capturable: bool | None = None) -> None:
        if cfg.train.cuda_graph and device.type != "cuda":
            raise ValueError(f"config: train.cuda_graph needs a CUDA GPU, got device {device}")
        check_backends(cfg.train.backend)
        self.cfg = cfg
        if capturable is None:
            capturable = self.decides_on(device)
        process.seed_all(cfg.train.seed)
        model = build_model(cfg.model).to(device)
        model.compute_dtype = PRECISIONS[cfg.train.precision]
        model.train()
        model.graph_safe = cfg.train.cuda_graph
        if cfg.train.compile:
            compile_regions(model)
        groups = param_groups(model, cfg.optim)
        optimizer = build_optimizer(groups, cfg.optim, model.teacher_pairs(), capturable=capturable)
        super().__init__(model, optimizer, device, capturable=capturable)
        self.graphs = StepGraphs(self, CudaCapture(device)) if cfg.train.cuda_graph else None

    def step(self, number: int, batches: list[Batch]) -> Outcome:
        """Global step `number`, counted from 1. NaN or inf in loss or gradient leaves everything as it was.

        With train.cuda_graph the outcome's tensors are overwritten by the next step.
        """
        with use_backends(self.cfg.train.backend):
            if self.graphs is not None:
                return self.graphs.step(number, batches)
            lr = learning_rate(self.cfg.optim, number - 1, self.cfg.train.steps)
            decay = teacher_decay(self.cfg.ema, number)
            return self.work(batches, [batch.epoch for batch in batches], lr, decay)

    def load(self, checkpoint: Checkpoint) -> None:
        """See `Learner.load`; graphs are recorded anew, as the optimizer's state lies elsewhere."""
        super().load(checkpoint)
        if self.graphs is not None:
            self.graphs.forget()

    def work(
        self,
        batches: list[Batch],
        epochs: Sequence[int | Tensor],
        lr: float | Tensor,
        decay: float | Tensor,
    ) -> Outcome:
        """What a step does, given its schedules: numbers, or 0-dim tensors on the device."""
        cfg, model, seed = self.cfg, self.model, self.cfg.train.seed
        with phase("masks"):
            plans = [
                model.sample_masks(b.source, b.ids, epoch=epoch, seed=seed, padding_mask=b.padding_mask)
                for b, epoch in zip(batches, epochs, strict=True)
            ]
        total = sum(plan.clones * plan.samples * (plan.tokens - plan.kept) for plan in plans)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for batch, plan in zip(batches, plans, strict=True):
            with phase("forward"):
                out = model(batch.source, batch.padding_mask, plan)
            with phase("backward"):
                (out.loss_sum / total).backward()
            with phase("loss"):
                _accumulate(losses, out.losses, 1 / total)
                _accumulate(metrics, out.metrics, 1 / len(batches))
        with phase("optimizer"):
            good, norm = self.update(list(losses.values()), lr, cfg.optim.clip, decay)
        return Outcome(good, losses, norm, lr, decay, metrics, out.health)

    def report(
        self, number: int, outcome: Outcome
    ) -> tuple[dict[str, Any], Callable[[], tuple[dict[str, Any], list[Alarm]]]]:
        """The numbers of a log step, read from the device, and what computes the rest of its line and alarms.

        The rest, variances and ranks, takes tens of milliseconds. It reads copies on the host, so it can be
        asked for on another thread while the next steps run.
        """
        cfg = self.cfg.train
        parts = {f"loss_{name}": value for name, value in outcome.losses.items()}
        scalars = {**parts, "grad_norm": outcome.grad_norm, **outcome.metrics}
        values = torch.stack([v.detach().double().reshape(()) for v in scalars.values()]).tolist()
        read = dict(zip(scalars, values, strict=True))
        row = {
            "step": number,
            "loss": sum(read[name] for name in parts),
            **read,
            "lr": float(outcome.lr),
            "ema_decay": float(outcome.decay),
        }
        alarming = bool(outcome.good) and number > cfg.alarm_after
        rows = {name: tokens.detach().to("cpu", copy=True) for name, tokens in outcome.health.items()}

        def health() -> tuple[dict[str, Any], list[Alarm]]:
            states = measure(rows)
            alarms = judge(states, cfg) if alarming else []
            columns = {
                **{f"{s.part.short}_var": s.variance for s in states if f"{s.part.short}_var" not in read},
                **{f"{s.part.short}_rank": s.rank for s in states},
                "alarms": [alarm.kind for alarm in alarms],
            }
            return columns, alarms

        return row, health


def _accumulate(sums: dict[str, Tensor], values: dict[str, Tensor], factor: float) -> None:
    for name, value in values.items():
        term = value.detach() * factor
        sums[name] = sums[name] + term if name in sums else term
