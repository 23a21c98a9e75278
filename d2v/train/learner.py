"""What every kind of training does with a model: one guarded optimizer step, bad steps, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from d2vkern import AdamWEMA

from ..config.toml import CheckpointError
from . import process
from .checkpoint import Checkpoint, fill_model
from .optim import clip_factor, set_learning_rate


@dataclass
class Outcome:
    """What one global step leaves for the log: device tensors, read on log steps only."""

    good: Tensor
    """0-dim bool: whether loss and gradient were finite and the step was taken"""
    losses: dict[str, Tensor]
    """0-dim each: summed over the masked tokens of the global batch; in fine-tuning "loss", per sample"""
    grad_norm: Tensor
    """before clipping"""
    lr: float | Tensor
    decay: float | Tensor = 0.0
    """of the teacher"""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """`out.metrics`, averaged over the micro-batches"""
    health: dict[str, Tensor] = field(default_factory=dict)
    """token rows [n, D] of the last micro-batch"""


Model = TypeVar("Model", bound=nn.Module)


class Learner(Generic[Model]):
    """A model and its optimizer.

    capturable: take decisions on the device, reading nothing there.
    """

    def __init__(self, model: Model, optimizer: AdamWEMA, device: torch.device, *, capturable: bool) -> None:
        self.model, self.optimizer, self.device, self.capturable = model, optimizer, device, capturable
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self._named.values())
        self.bad = torch.zeros(2, dtype=torch.int64, device=device)
        """bad steps so far, and bad steps in a row now"""

    @staticmethod
    def decides_on(device: torch.device) -> bool:
        """Whether decisions are taken on the device unless told: except on a CPU, where reading is free."""
        return device.type != "cpu"

    def update(
        self,
        losses: Sequence[Tensor],
        lr: float | Tensor,
        clip: float | None,
        ema_decay: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Step on the gradients that are there and clear them; NaN or inf there or in a loss changes nothing.

        losses: 0-dim. Returns whether the step was good (0-dim bool) and the gradients' norm before clipping.
        """
        norm, factor = clip_factor(self.parameters, clip)
        good = torch.isfinite(torch.stack([*losses, norm])).all()
        set_learning_rate(self.optimizer, lr)
        if self.capturable:
            self.optimizer.step(clip_factor=factor, ema_decay=ema_decay, found_inf=(~good).float())
        elif good:
            self.optimizer.step(clip_factor=factor, ema_decay=ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
        self.bad.add_(~good)
        self.bad[1].mul_(~good)
        return good, norm

    def count_bad(self) -> tuple[int, int]:
        """Bad steps so far, and in a row now; waits for the device."""
        skipped, in_a_row = self.bad.tolist()
        return skipped, in_a_row

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name -> field -> tensor, for a checkpoint."""
        return {
            name: dict(self.optimizer.state[p]) for name, p in self._named.items() if self.optimizer.state[p]
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: weights (a teacher's too), optimizer and random states.

        It may have been saved on another kind of device. CheckpointError for what does not fit the model.
        """
        if unknown := checkpoint.optimizer.keys() - self._named.keys():
            raise CheckpointError(
                f"{checkpoint.path}: optimizer state of {min(unknown)}, which is not trained"
            )
        fill_model(self.model, checkpoint.model, checkpoint.path)
        groups = self.optimizer.state_dict()["param_groups"]
        numbers = {
            p: number
            for group, described in zip(self.optimizer.param_groups, groups, strict=True)
            for p, number in zip(group["params"], described["params"], strict=True)
        }
        state = {}
        for name, fields in checkpoint.optimizer.items():
            p = self._named[name]  # beside which moments lie; where the count does the optimizer knows
            state[numbers[p]] = {
                key: value if value.ndim == 0 else value.to(p.device, copy=True)
                for key, value in fields.items()
            }
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        process.restore(checkpoint.rng, self.device)
