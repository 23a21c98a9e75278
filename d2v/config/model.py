"""What a model is made of, as frozen dataclasses: masks, decoder, targets, blocks.

A value that cannot be met raises `ValueError` when the dataclass is made, so nothing has run yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from .fronts import (
    DEPTH,
    WIDTH,
    Front,
    ImageFront,
    LogMelFront,
    Modality,
    TextFront,
    check,
    check_probability,
    check_sizes,
)

Objective = Literal["data2vec2", "data2vec1", "mae", "mlm"]


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which tokens the student does not see (`d2vkern.ops.masks`)."""

    prob: float = 0.8
    """share of tokens masked"""
    length: int = 3
    """side of a square (image), length of a span; random masks do not read it"""
    adjust: float = 0.07
    """added to the share when block centres are counted; the exact share is restored afterwards"""
    clones: int = 16
    """masked versions of each sample, M"""
    kind: Literal["inverse_block", "block", "span", "random"] | None = None
    """squares that stay visible or that are masked (image), masked spans (audio, text), single tokens; none:
    inverse_block for images, span for audio, random for text"""

    def __post_init__(self) -> None:
        check(0.0 < self.prob < 1.0, "mask.prob", "in (0, 1)", self.prob)
        check(self.length > 0, "mask.length", "positive", self.length)
        check(self.adjust >= 0.0, "mask.adjust", "at least 0", self.adjust)
        check_sizes(self, "mask", clones=1_000)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The small convolutional decoder: 2-D on the patch grid for images, 1-D otherwise."""

    dim: int = 768
    groups: int = 16
    kernel: int = 3
    layers: int = 6
    residual: bool = True
    """add a layer's input to its output where the widths agree"""
    projection_layers: int = 1
    """linear layers from `dim` back to the model's width, GELU between"""
    projection_ratio: float = 2.0
    """hidden width of the projection over `dim`"""
    input_dropout: float = 0.0
    noise_std: float = 0.01
    """deviation of the Gaussian noise put at masked places (there is no learned mask token)"""

    def __post_init__(self) -> None:
        check_sizes(
            self, "decoder", dim=WIDTH, groups=WIDTH, kernel=1_000, layers=DEPTH, projection_layers=DEPTH
        )
        check(self.dim % self.groups == 0, "decoder.dim", f"a multiple of groups {self.groups}", self.dim)
        check(
            0 < self.projection_ratio <= 100, "decoder.projection_ratio", "in (0, 100]", self.projection_ratio
        )
        check_probability("decoder.input_dropout", self.input_dropout)
        check(self.noise_std >= 0, "decoder.noise_std", "at least 0", self.noise_std)


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """The transformer decoder of objective mae."""

    dim: int = 512
    heads: int = 16
    depth: int = 8

    def __post_init__(self) -> None:
        check_sizes(self, "mae", dim=WIDTH, heads=WIDTH, depth=DEPTH)
        contract = f"a multiple of 4 and of heads {self.heads}"
        check(self.dim % 4 == self.dim % self.heads == 0, "mae.dim", contract, self.dim)


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What the teacher's layers become: top-K FFN outputs, each normalised, averaged, normalised."""

    top_k: int = 10
    """number of last main blocks averaged"""
    norm: Literal["instance", "layer", "batch"] | None = "instance"
    """norm of each layer; batch: over the tokens of a forward, so train.micro_batch changes it"""
    final: Literal["layer", "instance"] | None = None
    """norm of the average"""

    def __post_init__(self) -> None:
        check(self.top_k > 0, "target.top_k", "positive", self.top_k)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and objective of one model."""

    front: Front
    objective: Objective = "data2vec2"
    """what is learned; `d2v train --objective` also sets what its paper sets (d2v/config/objectives.py)"""
    mask: MaskConfig = field(default_factory=MaskConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    mae: MAEConfig = field(default_factory=MAEConfig)
    dim: int = 768
    heads: int = 12
    prenet_depth: int = 0
    """blocks inside the modality encoder: trained alike, never counted as target layers"""
    depth: int = 12
    """main blocks"""
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    """eps of the blocks' and the context norm; every other norm uses 1e-5, as in the original"""
    prenet_dropout: float = 0.0
    """on the normed tokens before the prenet, be it without blocks; text without blocks has neither norm nor
    dropout there (modalities/{base,text}.py)"""
    encoder_dropout: float = 0.1
    """after the attention projection"""
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    """between the two layers of the MLP"""
    post_mlp_dropout: float = 0.1
    """after the MLP"""
    layerdrop: float = 0.0
    """probability of skipping a main block of the student"""
    loss_beta: float = 0.0
    """0: squared error; above: smooth L1 with this beta"""
    loss_scale: float | None = None
    """factor on the regression loss; none: 1 / sqrt(dim)"""
    cls_loss: float = 0.0
    """weight of the CLS loss (CLS output against the mean target)"""
    cls_rows: int | None = None
    """rows (B*M) the CLS sum is scaled to, so that it does not grow with the micro-batch;
    none: as many as there are, what the original does (on each GPU; 256 there in image_base, else 128)"""
    init_std: float = 0.02
    """deviation of the initial Linear and Embedding weights; small widths want about 0.55 / sqrt(dim), which
    is 0.02 at the published ones"""
    ema_encoder_only: bool = False
    """the teacher averages the blocks only and reads the student's embeddings (text)"""

    def __post_init__(self) -> None:
        known = get_args(Objective)
        check(self.objective in known, "model.objective", f"one of {', '.join(known)}", self.objective)
        check_sizes(self, "model", dim=WIDTH, heads=WIDTH, depth=DEPTH)
        check(0 <= self.prenet_depth <= DEPTH, "model.prenet_depth", f"in 0 .. {DEPTH:,}", self.prenet_depth)
        check(self.dim % self.heads == 0, "model.dim", f"a multiple of heads {self.heads}", self.dim)
        check(0 < self.mlp_ratio <= 100, "model.mlp_ratio", "in (0, 100]", self.mlp_ratio)
        check(self.norm_eps > 0, "model.norm_eps", "positive", self.norm_eps)
        check(
            self.target.top_k <= self.depth, "target.top_k", f"at most depth {self.depth}", self.target.top_k
        )
        for name in ("prenet_dropout", "encoder_dropout", "attention_dropout", "activation_dropout",
                     "post_mlp_dropout", "layerdrop"):  # fmt: skip
            check_probability(f"model.{name}", getattr(self, name))
        check(self.loss_beta >= 0, "model.loss_beta", "at least 0", self.loss_beta)
        check(self.cls_loss >= 0, "model.cls_loss", "at least 0", self.cls_loss)
        if isinstance(self.front, ImageFront):
            check(self.dim % 4 == 0, "model.dim", "a multiple of 4 (2-D sine-cosine table)", self.dim)
        if self.cls_loss:
            check(self.front.extra_tokens > 0, "model.cls_loss", "0 without extra tokens", self.cls_loss)
            check(self.objective == "data2vec2", "model.cls_loss", "0 but for data2vec2", self.cls_loss)
        image = self.modality == "image"
        kinds = ("inverse_block", "block", "random") if image else ("span", "random")
        check(self.mask_kind in kinds, "mask.kind", f"one of {', '.join(kinds)}", self.mask.kind)
        if self.objective == "mae":
            fits = isinstance(self.front, (ImageFront, LogMelFront))
            check(fits, "model.objective", "another for a front end without patches or spectra", "mae")
        if self.objective == "mlm":
            check(
                isinstance(self.front, TextFront), "model.objective", "another without tokens of text", "mlm"
            )

    @property
    def modality(self) -> Modality:
        return self.front.modality

    @property
    def mask_kind(self) -> str:
        """`mask.kind`, or the modality's own."""
        return self.mask.kind or {"image": "inverse_block", "audio": "span", "text": "random"}[self.modality]
