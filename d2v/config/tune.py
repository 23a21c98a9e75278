"""Everything one fine-tuning run is made of: frozen dataclasses, filled by a recipe and by the user."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from .fronts import Modality, TextFront, check, check_probability
from .model import ModelConfig
from .run import DataConfig, OptimConfig, RunConfig

Task = Literal["classify", "ctc", "sentence"]
FITS: dict[Task, tuple[Modality, ...]] = {
    "classify": ("image", "audio"),
    "ctc": ("audio",),
    "sentence": ("text",),
}
"""task -> modalities of the models that it is for"""


def check_task(task: Task, modality: Modality) -> None:
    """ValueError for a task that does not fit a model."""
    if modality not in FITS[task]:
        fits = ", ".join(name for name, some in FITS.items() if modality in some)
        raise ValueError(
            f"finetune: task {task} needs {' or '.join(FITS[task])}, got {modality}, for which {fits} is"
        )


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What stands on the encoder."""

    task: Task
    """classify: mean over tokens, LayerNorm, linear (image, speech); ctc: linear at every frame (speech);
    sentence: the first token through RoBERTa's two layers (text)"""
    outputs: int = 0
    """classes, letters of the vocabulary, or 1 for regression; 0: counted on the data"""
    regression: bool = False
    """sentence: labels are numbers, the loss is the squared error (STS-B)"""

    def __post_init__(self) -> None:
        check(0 <= self.outputs <= 10_000_000, "head.outputs", "in 0 .. 10,000,000", self.outputs)
        check(
            not self.regression or self.task == "sentence", "head.regression", "for sentences only", self.task
        )


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """Regularisation inside the encoder; it takes the place of what pretraining used."""

    dropout: float = 0.0
    """after attention, MLP and before the prenet"""
    attention: float = 0.0
    activation: float = 0.0
    path: float = 0.0
    """largest drop path: it grows linearly over the main blocks (mae_image_classification.py)"""
    layer: float = 0.0
    """probability of skipping a block, prenet included"""
    head: float = 0.0
    """sentence: before each of the head's layers"""

    def __post_init__(self) -> None:
        for name in ("dropout", "attention", "activation", "path", "layer", "head"):
            check_probability(f"drop.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Pictures, batched on the device, after the random crop and flip of `data`."""

    rand_ops: int = 0
    """RandAugment: operations per picture; 0: none"""
    rand_magnitude: int = 9
    """of 30"""
    erase: float = 0.0
    """probability that a rectangle becomes noise"""
    mixup: float = 0.0
    """alpha of the Beta distribution; 0: none"""
    cutmix: float = 0.0
    mix_probability: float = 1.0
    """that a batch is mixed at all"""
    mix_switch: float = 0.5
    """share of mixed batches that get cutmix, where both are on"""
    mix_batch: int | None = None
    """pictures of a step, in its order, that are mixed with each other by one draw: those of one process in
    the original; none: the whole step"""
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check(self.rand_ops >= 0, "augment.rand_ops", "at least 0", self.rand_ops)
        check(0 < self.rand_magnitude < 30, "augment.rand_magnitude", "in 1..29", self.rand_magnitude)
        for name in ("mixup", "cutmix"):
            check(getattr(self, name) >= 0, f"augment.{name}", "at least 0", getattr(self, name))
        for name in ("erase", "mix_probability", "mix_switch"):
            check(0 <= getattr(self, name) <= 1, f"augment.{name}", "in [0, 1]", getattr(self, name))
        check(self.mix_batch is None or self.mix_batch > 0, "augment.mix_batch", "positive or none",
              self.mix_batch)  # fmt: skip
        check_probability("augment.label_smoothing", self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class SpanConfig:
    """Masks over speech while training, SpecAugment's way, on the local features (wav2vec2_asr.py)."""

    time_prob: float = 0.0
    """share of frames covered if spans did not overlap"""
    time_length: int = 10
    channel_prob: float = 0.0
    channel_length: int = 64

    def __post_init__(self) -> None:
        for name in ("time", "channel"):
            check_probability(f"span.{name}_prob", getattr(self, f"{name}_prob"))
            length = getattr(self, f"{name}_length")
            check(length > 0, f"span.{name}_length", "positive", length)


@dataclass(frozen=True, kw_only=True)
class TuneConfig(RunConfig):
    """Length, precision, saving and evaluation of a run."""

    keep: int = 1
    """newest checkpoints kept, beside the best one"""
    layer_decay: float = 1.0
    """learning rate of a block over that of the next one; embeddings are not decayed, as in the original"""
    freeze_steps: int = 0
    """first steps in which the head alone learns"""
    freeze_front: bool = False
    """the convolutions of speech never learn (feature_grad_mult 0)"""
    evaluate_every: int = 1000
    """steps between evaluations on the held-out split; the last step is always evaluated"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.evaluate_every > 0, "train.evaluate_every", "positive", self.evaluate_every)
        check(0 < self.layer_decay <= 1, "train.layer_decay", "in (0, 1]", self.layer_decay)
        check(self.freeze_steps >= 0, "train.freeze_steps", "at least 0", self.freeze_steps)


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """One run: a recipe, and the encoder it starts from."""

    recipe: str
    head: HeadConfig
    model: ModelConfig
    """of the encoder, with this run's dropouts"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    drop: DropConfig = field(default_factory=DropConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    span: SpanConfig = field(default_factory=SpanConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TuneConfig = field(default_factory=TuneConfig)
    transformers: str | None = None
    """JSON of the config of the model of transformers that is the encoder; none: the encoder is ours"""
    data_limit: int | None = None
    """training samples used, as many of each class as there are; none: all"""
    vocabulary: str | None = None
    """ctc: a vocabulary.json or a fairseq dictionary; none: counted on the training transcripts"""
    glue: str | None = None
    """GLUE task whose files and metrics these are (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte)"""

    def __post_init__(self) -> None:
        check_task(self.head.task, self.model.modality)


def tuned_model_config(cfg: ModelConfig, drop: DropConfig) -> ModelConfig:
    """The encoder's config with the dropouts of fine-tuning."""
    cfg = replace(
        cfg,
        prenet_dropout=drop.dropout,
        encoder_dropout=drop.dropout,
        post_mlp_dropout=drop.dropout,
        attention_dropout=drop.attention,
        activation_dropout=drop.activation,
        layerdrop=drop.layer,
    )
    if isinstance(cfg.front, TextFront):
        cfg = replace(cfg, front=replace(cfg.front, dropout=drop.dropout))
    return cfg
