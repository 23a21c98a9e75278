"""What objectives with a teacher share: the EMA copy of the student, and the targets it gives.

Source: fairseq examples/data2vec/models/data2vec2.py, make_ema_teacher and the forward's target part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import d2vkern

from ..config.fronts import ImageFront
from ..config.model import ModelConfig
from .blocks import AttentionContext
from .encoder import Network, ffn_outputs
from .pretraining import Pretraining


class Distillation(Pretraining):
    """A student that predicts layers of its own moving average, `_ema`."""

    def __init__(self, cfg: ModelConfig, *, decoder: bool) -> None:
        super().__init__(cfg, decoder=decoder)
        self._initialise()
        if cfg.ema_encoder_only:
            self._ema: nn.Module = Network(cfg, local=False, decoder=False).blocks
        else:
            self._ema = Network(cfg, local=isinstance(cfg.front, ImageFront), decoder=False)
        self._ema.requires_grad_(False)
        self._ema.eval()
        self.reset_teacher()

    @property
    def teacher(self) -> nn.Module:
        """The fp32 EMA weights, under the student's names (text: the blocks alone)."""
        return self._ema

    def train(self, mode: bool = True) -> Distillation:
        """As `nn.Module.train`; the teacher always stays in eval mode."""
        super().train(mode)
        self._ema.eval()
        return self

    def teacher_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's tensors and the student's they average, in the same order."""
        student = dict(self.named_parameters())
        prefix = "blocks." if self.cfg.ema_encoder_only else ""
        pairs = [(p, student[prefix + name]) for name, p in self._ema.named_parameters()]
        return [t for t, _ in pairs], [s for _, s in pairs]

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher = decay * teacher + (1 - decay) * student; parameters without gradient are copied."""
        teacher, student = self.teacher_pairs()
        moving = []
        for t, s in zip(teacher, student, strict=True):
            if s.requires_grad:
                moving.append((t, s))
            else:
                t.copy_(s)
        d2vkern.ema_update_([t for t, _ in moving], [s for _, s in moving], decay)

    @torch.no_grad()
    def reset_teacher(self) -> None:
        """The teacher becomes an exact copy of the student."""
        for t, s in zip(*self.teacher_pairs(), strict=True):
            t.copy_(s)

    def _teacher_view(
        self, source: Tensor, samples: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, AttentionContext, nn.ModuleList]]:
        local = self._teacher_local(source, samples)
        return local, self._teacher_input(local, lengths)

    def _teacher_local(self, source: Tensor, samples: Tensor | None) -> Tensor:
        """What a teacher that runs alone starts from: its own patches, or the student's local features."""
        if isinstance(self._ema, Network) and isinstance(self.cfg.front, ImageFront):
            return self._ema.encoder.local(source, None, self.compute_dtype)
        return self.encoder.local(source, samples, self.compute_dtype)

    def _teacher_input(
        self, local: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, AttentionContext, nn.ModuleList]:
        """Input of the teacher's main blocks, their context, and the blocks."""
        if isinstance(self._ema, Network):
            return *self._ema.encoder.contextualise(local, None, lengths), self._ema.blocks
        assert isinstance(self._ema, nn.ModuleList)
        return *self.encoder.contextualise(local, None, lengths), self._ema

    @torch.no_grad()
    def _targets(self, source: Tensor, local: Tensor, lengths: Tensor | None) -> Tensor:
        """[B,T,D] fp32: the mean of the teacher's last FFN outputs, each normalised; normalised again."""
        target, extra = self.cfg.target, self.cfg.front.extra_tokens
        if isinstance(self.cfg.front, ImageFront):
            local = self._teacher_local(source, None)
        x, context, blocks = self._teacher_input(local, lengths)
        average = d2vkern.LayerTargets(target.norm, target.final)
        for i, ffn in enumerate(ffn_outputs(blocks, x, context)):
            if i >= len(blocks) - target.top_k:
                average.add(ffn[:, extra:])
        return average.result()
