"""Data2Vec: student, teacher and decoder; one forward pass of pretraining.

The teacher sees each sample once and whole; the student sees M masked versions of it, unmasked tokens only;
the decoder predicts the teacher's averaged layers at the masked places (paper, section 3). Parameter names
are the original's; the teacher's carry the prefix `_ema.`.
Source: fairseq examples/data2vec/models/data2vec2.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import d2vkern
from d2vkern._nvtx import phase

from ..config.model import ModelConfig
from .pretraining import PretrainOutput, regression_output
from .teacher import Distillation


class Data2Vec(Distillation):
    """A data2vec 2.0 model of one modality; see `Pretraining`."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg, decoder=True)

    def _objective(
        self, source: Tensor, samples: Tensor | None, lengths: Tensor | None, plan: d2vkern.MaskPlan
    ) -> PretrainOutput:
        local = self._local(source, samples, plan)
        with phase("teacher"):
            targets = self._targets(source, local.detach(), lengths)
        with phase("student/front"):
            x, context = self.encoder.contextualise(local, plan, lengths)
        student = self.student(x, context)
        decoder = self.encoder.decoder
        assert decoder is not None
        dec = decoder.settings
        with phase("decoder"):
            dropped = nn.functional.dropout(student, dec.input_dropout, self.training)
            noise_seed = torch.randint(2**62, (), device=dropped.device) if dec.noise_std else 0
            on_grid = d2vkern.scatter_tokens(dropped, plan, dec.noise_std, noise_seed)
            prediction = decoder(on_grid, plan)
        with phase("loss"):
            regression = d2vkern.masked_regression_loss(
                prediction, targets, plan, self.cfg.loss_beta, self.cfg.loss_scale
            )
            losses = {}
            if self.cfg.cls_loss:
                losses["cls"] = self._cls_loss(student, targets, plan) * regression.count
            losses[f"{self.modality.upper()}_regression"] = regression.loss
            return regression_output(
                losses,
                regression,
                student=student,
                targets=targets,
                plan=plan,
                health={"front": local, "prediction": prediction, "target": targets},
                decode=lambda: decoder.full(on_grid),
            )

    def _cls_loss(self, student: Tensor, targets: Tensor, plan: d2vkern.MaskPlan) -> Tensor:
        """The last extra token against the mean target, summed over rows and width, times its weight."""
        cfg = self.cfg
        pred = student[:, cfg.front.extra_tokens - 1].float().view(plan.samples, plan.clones, -1)
        goal = targets.mean(1, keepdim=True).expand_as(pred)
        if cfg.loss_beta:
            loss = nn.functional.smooth_l1_loss(pred, goal, beta=cfg.loss_beta, reduction="sum")
        else:
            loss = (pred - goal).square().sum()
        scale = cfg.dim**-0.5 if cfg.loss_scale is None else cfg.loss_scale
        rows = plan.samples * plan.clones
        return loss * (cfg.cls_loss * scale * (cfg.cls_rows or rows) / max(1, rows))
