"""Data2Vec: student, teacher and decoder; one forward pass of pretraining, and features.

The teacher sees each sample once and whole; the student sees M masked versions of it, unmasked tokens only;
the decoder predicts the teacher's averaged layers at the masked places (paper, section 3). Parameter names
are the original's; the teacher's carry the prefix `_ema.`.
Source: fairseq examples/data2vec/models/data2vec2.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

import d2vkern
from d2vkern._nvtx import phase

from ..config import ImageFront, ModelConfig, TextFront
from .blocks import AttentionContext
from .encoder import Network, ffn_outputs, run_blocks
from .frontends import token_lengths

HEALTH_ROWS = 512
"""tokens of each kind that a forward pass hands to the collapse alarms"""


@dataclass
class PretrainOutput:
    """What one pretraining forward gives. N = B * M rows, row b*M + m is masked version m of sample b."""

    loss_sum: Tensor
    """0-dim: all losses summed over tokens and width"""
    sample_size: Tensor
    """0-dim int64: masked tokens of all rows"""
    losses: dict[str, Tensor]
    """each loss, summed (no gradient)"""
    student: Tensor
    """[N,E+K,D] student encoder output"""
    targets: Tensor
    """[B,T,D] fp32"""
    plan: d2vkern.MaskPlan
    metrics: dict[str, Tensor]
    """0-dim: pred_var, target_var (mean over D of the deviation over masked tokens)"""
    health: dict[str, Tensor]
    """[n,D] fp32 sample tokens of "front", "prediction", "target" for rank and variance"""
    _decode: Callable[[], Tensor] = field(repr=False)

    @property
    def loss(self) -> Tensor:
        """0-dim: all losses over the number of masked tokens, what the original's trainer minimises."""
        return self.loss_sum / self.sample_size

    @cached_property
    def decoded(self) -> Tensor:
        """[N,T,D] decoder output at every place; made on request: the loss needs the masked places only."""
        return self._decode()


@dataclass
class Features:
    """The encoder's view of whole samples."""

    x: Tensor
    """[B,T,D] output of the last block, extra tokens removed"""
    layers: list[Tensor]
    """[B,E+T,D] FFN output of each main block before residual and norm: what targets are made of"""
    padding_mask: Tensor | None
    """[B,T] bool, True = padding"""


class Data2Vec(Network):
    """A data2vec 2.0 model of one modality.

    cfg: architecture and loss. compute_dtype: dtype of activations and matrix products (fp32 or bf16);
    parameters, teacher, softmax, norm statistics, targets and loss stay in fp32.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg, local=True, decoder=True)
        self.cfg = cfg
        self.compute_dtype = torch.float32
        self.graph_safe = False
        """layerdrop decides on the device, so that a recorded graph decides anew at each replay"""
        self._initialise()
        if cfg.ema_encoder_only:
            self._ema: nn.Module = Network(cfg, local=False, decoder=False).blocks
        else:
            self._ema = Network(cfg, local=isinstance(cfg.front, ImageFront), decoder=False)
        self._ema.requires_grad_(False)
        self._ema.eval()
        self.reset_teacher()

    @property
    def modality(self) -> str:
        return self.cfg.modality

    @property
    def teacher(self) -> nn.Module:
        """The fp32 EMA weights, under the student's names (text: the blocks alone)."""
        return self._ema

    def train(self, mode: bool = True) -> Data2Vec:
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

    def sample_masks(
        self,
        source: Tensor,
        ids: Tensor,
        *,
        epoch: int | Tensor = 0,
        seed: int = 0,
        padding_mask: Tensor | None = None,
    ) -> d2vkern.MaskPlan:
        """The masks of a batch by (seed, epoch, sample id, m). ids: [B] int64.

        padding_mask is not read: the original masks padding like any other token.
        """
        front, mask = self.cfg.front, self.cfg.mask
        ids = ids.to(source.device)
        if isinstance(front, ImageFront):
            return d2vkern.inverse_block_mask(
                ids, mask.clones, front.grid,
                prob=mask.prob, length=mask.length, adjust=mask.adjust, seed=seed, epoch=epoch,
            )  # fmt: skip
        if isinstance(front, TextFront):
            return d2vkern.random_mask(
                ids, mask.clones, source.shape[1], prob=mask.prob, seed=seed, epoch=epoch
            )
        return d2vkern.span_mask(
            ids, mask.clones, front.frames(source.shape[1]),
            prob=mask.prob, length=mask.length, adjust=mask.adjust, seed=seed, epoch=epoch,
        )  # fmt: skip

    def forward(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: Tensor | d2vkern.MaskPlan | None = None,
        *,
        ids: Tensor | None = None,
        epoch: int = 0,
        seed: int = 0,
    ) -> PretrainOutput:
        """One pretraining forward.

        source: image [B,C,H,W] float, waveform [B,samples] float (normalised per utterance), or token ids
            [B,T] int64.
        padding_mask: bool, True = padding, [B,samples] or [B,T]; padding stands at the end.
        mask: a MaskPlan, or [N,T] bool/int (non-zero = masked) with equal kept counts; None draws the masks:
            by (seed, epoch, ids) when `ids` [B] is given, from torch's default generator otherwise.
        Raises ValueError or TypeError for sources and masks that do not fit the model.
        """
        plan = self._plan(source, mask, ids, epoch, seed)
        samples, lengths = token_lengths(self.cfg.front, source, padding_mask)
        with phase("student/front"):
            local = self.encoder.local(source, samples, self.compute_dtype)
        if local.shape[1] != plan.tokens:
            raise ValueError(
                f"Data2Vec: mask must have {local.shape[1]} tokens for this source, got {plan.tokens}"
            )
        with phase("teacher"):
            targets = self._targets(source, local.detach(), lengths)
        with phase("student/front"):
            x, context = self.encoder.contextualise(local, plan, lengths)
        student = run_blocks(
            self.blocks, x, context, self.cfg.layerdrop if self.training else 0.0, self.graph_safe
        )
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
            return PretrainOutput(
                loss_sum=torch.stack(list(losses.values())).sum(),
                sample_size=regression.count,
                losses={name: value.detach() for name, value in losses.items()},
                student=student,
                targets=targets,
                plan=plan,
                metrics={"pred_var": regression.pred_var, "target_var": regression.target_var},
                health={
                    "front": _sample_rows(local),
                    "prediction": _sample_rows(prediction),
                    "target": _sample_rows(targets),
                },
                _decode=lambda: decoder.full(on_grid),
            )

    def features(
        self, source: Tensor, padding_mask: Tensor | None = None, *, teacher: bool = False
    ) -> Features:
        """Whole samples through the encoder, nothing masked; see `forward` for the arguments.

        teacher: use the EMA weights (speech and text read the student's local features, as in pretraining).
        """
        samples, lengths = token_lengths(self.cfg.front, source, padding_mask)
        if teacher:
            local = self._teacher_local(source, samples)
            x, context, blocks = self._teacher_input(local, lengths)
        else:
            local = self.encoder.local(source, samples, self.compute_dtype)
            x, context = self.encoder.contextualise(local, None, lengths)
            blocks = self.blocks
        layers = []
        for block in blocks:
            x, ffn = block(x, context)
            layers.append(ffn)
        tokens_mask = None
        if lengths is not None:
            tokens_mask = torch.arange(local.shape[1], device=lengths.device) >= lengths.unsqueeze(1)
        return Features(x[:, self.cfg.front.extra_tokens :], layers, tokens_mask)

    def _plan(
        self,
        source: Tensor,
        mask: Tensor | d2vkern.MaskPlan | None,
        ids: Tensor | None,
        epoch: int,
        seed: int,
    ) -> d2vkern.MaskPlan:
        if isinstance(mask, d2vkern.MaskPlan):
            return mask.to(source.device)
        if mask is not None:
            if mask.shape[0] % source.shape[0]:
                raise ValueError(f"Data2Vec: mask must have a multiple of B = {source.shape[0]} rows, "
                                 f"got {mask.shape[0]}")  # fmt: skip
            return d2vkern.MaskPlan.from_mask(mask.to(source.device), mask.shape[0] // source.shape[0])
        if ids is None:
            ids, seed = torch.arange(source.shape[0]), int(torch.randint(2**62, ()))
        return self.sample_masks(source, ids, epoch=epoch, seed=seed)

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

    @torch.no_grad()
    def _initialise(self) -> None:
        """Linear and Embedding N(0, init_std) with zero bias; then torch's default again for the speech
        projection and for the decoder's of image and audio, as the original does; convolutions keep
        their module's own init.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, self.cfg.init_std)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, self.cfg.init_std)
                if module.padding_idx is not None:
                    module.weight[module.padding_idx].zero_()
        encoder = self.encoder
        assert encoder.decoder is not None
        again: list[nn.Module] = []
        if self.modality != "text":
            again += encoder.decoder.proj.modules()
        if self.modality == "audio":
            assert encoder.project_features is not None
            again += encoder.project_features.modules()
        for module in again:
            if isinstance(module, nn.Linear):
                module.reset_parameters()


def _sample_rows(x: Tensor) -> Tensor:
    """At most HEALTH_ROWS tokens of [.., T, D], evenly spaced, detached, fp32."""
    rows = x.detach().flatten(0, -2)
    step = max(1, rows.shape[0] // HEALTH_ROWS)
    return rows[::step][:HEALTH_ROWS].float()
