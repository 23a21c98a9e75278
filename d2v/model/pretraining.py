"""What every pretraining objective shares: the encoder, masks by sample, features, and the form of a result.

An objective says in `_objective` how it turns local features and masks into losses. Data2Vec is the project's
own (data2vec.py); the others are what it is compared with (rivals.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

import d2vkern
from d2vkern._nvtx import phase
from d2vkern.ops.loss import LossOutput

from ..config.fronts import ImageFront, token_count
from ..config.model import ModelConfig
from .blocks import AttentionContext
from .encoder import Network, run_blocks
from .feature_encoder import padding_of, token_lengths

Weights = Literal["student", "teacher"]
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
    """[N,E+K,D] student encoder output ([N,E+T,D] where masked tokens go through the encoder)"""
    targets: Tensor
    """what is predicted: [B,T,D] fp32 (data2vec), patches [B,T,P] fp32 (mae), token ids [B,T] (mlm)"""
    plan: d2vkern.MaskPlan
    metrics: dict[str, Tensor]
    """0-dim: pred_var, target_var (mean over D of the deviation over masked tokens), or accuracy (mlm)"""
    health: dict[str, Tensor]
    """[n,D] fp32 sample tokens of "front", "prediction" and, where it is learned, "target", for alarms"""
    _decode: Callable[[], Tensor] = field(repr=False)

    @property
    def loss(self) -> Tensor:
        """0-dim: all losses over the number of masked tokens, what the original's trainer minimises."""
        return self.loss_sum / self.sample_size

    @cached_property
    def decoded(self) -> Tensor:
        """[N,T,..] predictions at every place; made on request: the loss needs the masked places only."""
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


class Pretraining(Network):
    """A model of one modality with what its objective needs beside the encoder.

    cfg: architecture and objective. compute_dtype: dtype of activations and matrix products (fp32 or bf16);
    parameters, teacher, softmax, norm statistics, targets and loss stay in fp32.
    """

    def __init__(self, cfg: ModelConfig, *, decoder: bool = False) -> None:
        super().__init__(cfg, local=True, decoder=decoder)
        self.cfg = cfg
        self.compute_dtype = torch.float32
        self.graph_safe = False
        """layerdrop decides on the device, so that a recorded graph decides anew at each replay"""

    @property
    def modality(self) -> str:
        return self.cfg.modality

    @property
    def teacher(self) -> nn.Module | None:
        """The fp32 EMA weights, under the student's names; None for an objective without a teacher."""
        return None

    def encoder_tensors(self) -> dict[str, Tensor]:
        """The student's encoder by its names, without decoder and heads; parameters and no copies."""
        return {
            name: t
            for name, t in self.state_dict(keep_vars=True).items()
            if name.startswith(("modality_encoders.", "blocks.")) and ".decoder." not in name
        }

    def teacher_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's tensors and the student's they average, in the same order."""
        return [], []

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
        tokens, kind = token_count(front, source.shape), self.cfg.mask_kind
        if kind == "random":
            return d2vkern.random_mask(ids, mask.clones, tokens, prob=mask.prob, seed=seed, epoch=epoch)
        if kind == "span":
            return d2vkern.span_mask(
                ids, mask.clones, tokens,
                prob=mask.prob, length=mask.length, adjust=mask.adjust, seed=seed, epoch=epoch,
            )  # fmt: skip
        assert isinstance(front, ImageFront)
        prob = mask.prob if kind == "inverse_block" else 1 - mask.prob
        plan = d2vkern.inverse_block_mask(
            ids, mask.clones, front.grid,
            prob=prob, length=mask.length, adjust=mask.adjust, seed=seed, epoch=epoch,
        )  # fmt: skip
        return plan if kind == "inverse_block" else _inverse(plan)

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
        return self._objective(source, samples, lengths, plan)

    def _objective(
        self, source: Tensor, samples: Tensor | None, lengths: Tensor | None, plan: d2vkern.MaskPlan
    ) -> PretrainOutput:
        """Losses of a batch. samples, lengths: [B] audio samples and [B] int32 tokens before the padding."""
        raise NotImplementedError

    def features(
        self, source: Tensor, padding_mask: Tensor | None = None, *, teacher: bool = False
    ) -> Features:
        """Whole samples through the encoder, nothing masked; see `forward` for the arguments.

        Of speech, padding reaches the real frames next to it through the convolutions that give positions:
        features that are the same in every batch are those of one utterance at a time, as `d2v probe`,
        `extract` and `eval` take them.
        teacher: use the EMA weights (speech and text read the student's local features, as in pretraining).
            ValueError for an objective without a teacher.
        """
        outputs, layers, padding = self._whole(source, padding_mask, teacher)
        return Features(outputs[-1][:, self.cfg.front.extra_tokens :], layers, padding)

    def outputs(
        self, source: Tensor, padding_mask: Tensor | None = None, *, teacher: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Output [B,E+T,D] of each main block, and the padding [B,T] (True) or None; see `features`."""
        outputs, _, padding = self._whole(source, padding_mask, teacher)
        return outputs, padding

    def _whole(
        self, source: Tensor, padding_mask: Tensor | None, teacher: bool
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Of each main block the output and the FFN output [B,E+T,D]; and the padding of tokens."""
        samples, lengths = token_lengths(self.cfg.front, source, padding_mask)
        if teacher:
            local, (x, context, blocks) = self._teacher_view(source, samples, lengths)
        else:
            local = self.encoder.local(source, samples, self.compute_dtype)
            x, context = self.encoder.contextualise(local, None, lengths)
            blocks = self.blocks
        outputs, layers = [], []
        for block in blocks:
            x, ffn = block(x, context)
            outputs.append(x)
            layers.append(ffn)
        return outputs, layers, padding_of(lengths, local.shape[1])

    def _teacher_view(
        self, source: Tensor, samples: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, AttentionContext, nn.ModuleList]]:
        """The teacher's local features of whole samples; input, context and list of its main blocks."""
        raise ValueError(f"features: weights must be student: objective {self.cfg.objective} has no teacher")

    def _local(self, source: Tensor, samples: Tensor | None, plan: d2vkern.MaskPlan) -> Tensor:
        """[B,T,D] local features, for as many tokens as the plan has."""
        with phase("student/front"):
            local = self.encoder.local(source, samples, self.compute_dtype)
        if local.shape[1] != plan.tokens:
            raise ValueError(
                f"Data2Vec: mask must have {local.shape[1]} tokens for this source, got {plan.tokens}"
            )
        return local

    def student(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Tokens through the main blocks, with layerdrop while training: [N,S,D]."""
        return run_blocks(
            self.blocks, x, context, self.cfg.layerdrop if self.training else 0.0, self.graph_safe
        )

    def _plan(
        self,
        source: Tensor,
        mask: Tensor | d2vkern.MaskPlan | None,
        ids: Tensor | None,
        epoch: int,
        seed: int,
    ) -> d2vkern.MaskPlan:
        if isinstance(mask, d2vkern.MaskPlan):
            if mask.kept_lengths is not None:
                raise ValueError(
                    "Data2Vec: mask must keep equally many tokens in every row, got a padded plan"
                )
            return mask.to(source.device)
        if mask is not None:
            if mask.shape[0] % source.shape[0]:
                raise ValueError(f"Data2Vec: mask must have a multiple of B = {source.shape[0]} rows, "
                                 f"got {mask.shape[0]}")  # fmt: skip
            return d2vkern.MaskPlan.from_mask(mask.to(source.device), mask.shape[0] // source.shape[0])
        if ids is None:
            ids, seed = torch.arange(source.shape[0]), int(torch.randint(2**62, ()))
        return self.sample_masks(source, ids, epoch=epoch, seed=seed)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Linear and Embedding N(0, init_std) with zero bias; then torch's default again for the speech
        projection and for the decoder's of image and audio, as the original does; convolutions keep
        their module's own init.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, self.cfg.init_std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, self.cfg.init_std)
                if module.padding_idx is not None:
                    module.weight[module.padding_idx].zero_()
        encoder = self.encoder
        again: list[nn.Module] = []
        if self.modality != "text" and encoder.decoder is not None:
            again += encoder.decoder.proj.modules()
        if self.modality == "audio":
            assert encoder.project_features is not None
            again += encoder.project_features.modules()
        for module in again:
            if isinstance(module, nn.Linear):
                module.reset_parameters()


def regression_output(
    losses: dict[str, Tensor],
    regression: LossOutput,
    *,
    student: Tensor,
    targets: Tensor,
    plan: d2vkern.MaskPlan,
    health: dict[str, Tensor],
    decode: Callable[[], Tensor],
) -> PretrainOutput:
    """What an objective that regresses gives. losses: summed; health: tokens, of which a sample is kept."""
    return PretrainOutput(
        loss_sum=torch.stack(list(losses.values())).sum(),
        sample_size=regression.count,
        losses={name: value.detach() for name, value in losses.items()},
        student=student,
        targets=targets,
        plan=plan,
        metrics={"pred_var": regression.pred_var, "target_var": regression.target_var},
        health={name: sample_rows(tokens) for name, tokens in health.items()},
        _decode=decode,
    )


def sample_rows(x: Tensor) -> Tensor:
    """At most HEALTH_ROWS tokens of [.., T, D], evenly spaced, detached, fp32."""
    rows = x.detach().flatten(0, -2)
    step = max(1, rows.shape[0] // HEALTH_ROWS)
    return rows[::step][:HEALTH_ROWS].float()


def _inverse(plan: d2vkern.MaskPlan) -> d2vkern.MaskPlan:
    """What was kept is masked, and the other way round; nothing is read on the host."""
    mask = ~plan.mask
    slot = torch.where(mask, -1, (~mask).cumsum(1, dtype=torch.int32) - 1).int()
    return d2vkern.MaskPlan(mask, plan.ids_mask, slot, plan.clones, plan.lengths)
