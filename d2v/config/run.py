"""Every setting of a run, as frozen dataclasses: what a preset returns and `config.toml` holds.

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
WaveNorm = Literal["fairseq", "transformers", "none"]


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


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_mode: Literal["fairseq", "torch"] = "fairseq"
    """fairseq adds eps to sqrt(v) before the bias correction, torch after it"""
    weight_decay: float = 0.05
    decay_all: bool = True
    """decay biases, norms and ALiBi scales too: what official training did, its own override being
    ignored by the optimizer (fairseq, FairseqCompositeOptimizer)"""
    clip: float | None = None
    """largest gradient norm; none: no clipping"""
    schedule: Literal["cosine", "tri_stage", "polynomial", "constant"] = "cosine"
    warmup: int = 0
    """steps of linear warm-up from 0"""
    min_lr: float = 0.0
    stages: tuple[float, float, float] = (0.1, 0.4, 0.5)
    """tri_stage: shares of warm-up, hold, decay"""
    end_scale: float = 0.05
    """tri_stage: last learning rate over the peak"""
    power: float = 1.0
    """polynomial: exponent of the decay"""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", "positive", self.lr)
        check(all(0 <= b < 1 for b in self.betas), "optim.betas", "in [0, 1)", self.betas)
        check(self.eps > 0, "optim.eps", "positive", self.eps)
        check(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)
        check(self.clip is None or self.clip > 0, "optim.clip", "positive or none", self.clip)
        check(self.warmup >= 0, "optim.warmup", "at least 0", self.warmup)
        check(0 <= self.min_lr <= self.lr, "optim.min_lr", "in [0, lr]", self.min_lr)
        check(abs(sum(self.stages) - 1) < 1e-6, "optim.stages", "shares that sum to 1", self.stages)
        check(0 < self.end_scale <= 1, "optim.end_scale", "in (0, 1]", self.end_scale)


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Teacher decay: linear from `decay` to `end_decay` over `anneal` steps; exactly 1 stops it."""

    decay: float = 0.9998
    end_decay: float = 0.99999
    anneal: int = 100_000

    def __post_init__(self) -> None:
        check(0 <= self.decay <= 1, "ema.decay", "in [0, 1]", self.decay)
        check(0 <= self.end_decay <= 1, "ema.end_decay", "in [0, 1]", self.end_decay)
        check(self.anneal >= 0, "ema.anneal", "at least 0", self.anneal)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become batches."""

    batch: int = 256
    """samples per step over all processes: images, text blocks; for audio: seconds"""
    workers: int = 0
    """loader processes; 0 loads in the main one"""
    prefetch: int = 2
    """batches each worker holds ready"""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """image: share of the area kept by the random resized crop"""
    flip: bool = True
    """image: random horizontal flip"""
    mean: tuple[float, ...] | None = None
    """image: per channel; none: ImageNet's for 3 channels, measured on the data otherwise"""
    std: tuple[float, ...] | None = None
    max_seconds: float = 15.6
    """audio: longer utterances are cropped at random"""
    min_seconds: float = 0.5
    """audio: shorter utterances are skipped and counted"""
    pad: bool = False
    """audio: pad a batch to its longest utterance (with lengths) instead of cropping to its shortest"""
    wave_norm: WaveNorm = "fairseq"
    """audio: every utterance gets zero mean and unit variance, with 1e-5 (fairseq) or 1e-7 (transformers)
    added to its variance; none: waveforms stay as they are recorded; fine-tuning takes over the encoder's"""
    bucket_seconds: float = 0.0
    """audio: the length of a step is a multiple of this, rounded down when cropping and up when padding; 0:
    any. Few shapes are what train.compile and train.cuda_graph need"""
    block: int = 512
    """text: tokens per block"""
    tokenizer: str | None = None
    """text: a tokenizers .json, or a folder with GPT-2's vocab.json and merges.txt; none: trained
    on the data"""

    def __post_init__(self) -> None:
        check_sizes(self, "data", batch=100_000_000, prefetch=10_000, block=10_000_000)
        check(self.bucket_seconds >= 0, "data.bucket_seconds", "at least 0", self.bucket_seconds)
        norms = get_args(WaveNorm)
        check(self.wave_norm in norms, "data.wave_norm", f"one of {', '.join(norms)}", self.wave_norm)
        check(0 <= self.workers <= 10_000, "data.workers", "in 0 .. 10,000", self.workers)
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "data.crop_scale", "0 < low <= high <= 1", self.crop_scale)
        check(
            0 < self.min_seconds <= self.max_seconds,
            "data.min_seconds",
            "in (0, max_seconds]",
            self.min_seconds,
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What pretraining and fine-tuning share: length, precision, saving and reporting of a run."""

    steps: int = 1000
    seed: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: activations and matrix products in bf16, weights, teacher and optimizer in fp32"""
    backend: str = "auto"
    """of d2vkern's ops: auto, eager, triton, native, or op by op: triton,attention=eager"""
    micro_batch: int | None = None
    """samples (audio: seconds) per forward; none: derived from free memory, in fine-tuning the whole batch.
    Inputs, masks and targets of a step do not depend on it; what is drawn forward by forward does: dropout,
    drop path, layerdrop, the noise that pretraining's decoder gets and the tokens that mlm puts in"""
    device: str = "auto"
    """auto: a CUDA GPU when there is one"""
    save_every: int = 1000
    """steps between checkpoints"""
    keep: int = 2
    """newest checkpoints kept"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    max_bad_steps: int = 10
    """steps in a row with a NaN or inf loss or gradient, each skipped, before the run stops"""

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep", "log_every", "max_bad_steps"):
            check(getattr(self, name) > 0, f"train.{name}", "positive", getattr(self, name))
        check(0 <= self.seed < 2**64, "train.seed", "in 0 .. 2^64 - 1", self.seed)
        check(self.micro_batch is None or self.micro_batch > 0, "train.micro_batch", "positive or none",
               self.micro_batch)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Length, precision, saving and reporting of pretraining."""

    compile: bool = False
    """torch.compile of the front end, every block and the decoder"""
    cuda_graph: bool = False
    """the whole step, masks to teacher update, as one CUDA graph per shape"""
    min_rank: float = 0.05
    """alarm: effective rank over width below this"""
    min_variance: float = 0.05
    """alarm: deviation across tokens of prediction, target or front end below this"""
    alarm_after: int = 100
    """steps before alarms may fire"""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Probes of the encoder while it is pretrained; they change nothing about the training."""

    every: int = 0
    """steps between probes, and one at the end; 0: none"""
    data: str | None = None
    """labelled data set, as `d2v probe` takes it; none: the run's own"""
    rows: int = 2_000
    """samples of each part at most, evenly spaced"""
    layers: tuple[int, ...] = (-1,)
    """indices of main blocks, negative from the last"""

    def __post_init__(self) -> None:
        check(self.every >= 0, "probe.every", "at least 0", self.every)
        check(self.rows > 1, "probe.rows", "at least 2", self.rows)
        check(len(self.layers) > 0, "probe.layers", "one or more blocks", self.layers)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: what a preset returns."""

    preset: str
    model: ModelConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
