"""Every setting of a run, as frozen dataclasses: what a preset returns and `config.toml` holds.

A value that cannot be met raises `ValueError` when the dataclass is made, so nothing has run yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from .fronts import ImageFront, TextFront, check, check_sizes
from .model import ModelConfig

WaveNorm = Literal["fairseq", "transformers", "none"]
Channels = Literal["mix", "first", "refuse"]
MOST_PIXELS = 178_956_970
"""in a picture that Pillow opens"""


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
    max_unreadable: float = 0.01
    """share of the samples that may be unreadable, each replaced by another; more stop the run. Up to 10 may
    be, or half of a smaller data set; 0: none"""
    shuffle_window: int = 0
    """samples that are shuffled together: an epoch goes through the data in pieces of a sixteenth of this, in
    random order, so that reading stays near what was read; 0: the whole data set"""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """image: share of the area kept by the random resized crop"""
    flip: bool = True
    """image: random horizontal flip"""
    mean: tuple[float, ...] | None = None
    """image: per channel; none: ImageNet's for 3 channels, measured on the data otherwise"""
    std: tuple[float, ...] | None = None
    max_pixels: int = 80_000_000
    """image: files whose header says more are not decoded but unreadable; this many take up to 0.9 GB"""
    max_seconds: float = 15.6
    """audio: longer utterances are cropped at random"""
    min_seconds: float = 0.5
    """audio: shorter utterances are skipped and counted"""
    pad: bool = False
    """audio: pad a batch to its longest utterance (with lengths) instead of cropping to its shortest"""
    wave_norm: WaveNorm = "fairseq"
    """audio: every utterance gets zero mean and unit variance, with 1e-5 (fairseq) or 1e-7 (transformers)
    added to its variance; none: waveforms stay as they are recorded; fine-tuning takes over the encoder's"""
    channels: Channels = "mix"
    """audio: of a file with several channels (stereo) their mean, or the first alone; refuse: it is
    unreadable; fine-tuning takes over the encoder's"""
    bucket_seconds: float = 0.0
    """audio: the length of a step is a multiple of this, rounded down when cropping and up when padding; 0:
    any. Few shapes are what train.compile and train.cuda_graph need"""
    text_column: str = "text"
    """text: key of .jsonl lines and column of .csv, .tsv and .parquet tables that holds the text; audio: of
    tables that name files what holds the transcript (text: also transcription, transcript, sentence, wrd)"""
    label_column: str = "label"
    """that which holds the label, where labels are read, in rows of Hugging Face data sets too, and in tables
    that name files (label: also category, class, class_name, target)"""
    audio_column: str = ""
    """audio: of tables that name files what holds the names; empty: file_name, filename, file, path, audio,
    audio_filepath, wav or fname"""
    block: int = 512
    """text: tokens per block, at least 4"""
    tokenizer: str | None = None
    """text: a tokenizers .json, or a folder with GPT-2's vocab.json and merges.txt; none: trained
    on the data"""

    def __post_init__(self) -> None:
        check_sizes(
            self, "data", batch=100_000_000, prefetch=10_000, block=10_000_000, max_pixels=MOST_PIXELS
        )
        check(self.shuffle_window >= 0, "data.shuffle_window", "at least 0", self.shuffle_window)
        check(self.bucket_seconds >= 0, "data.bucket_seconds", "at least 0", self.bucket_seconds)
        norms = get_args(WaveNorm)
        check(self.wave_norm in norms, "data.wave_norm", f"one of {', '.join(norms)}", self.wave_norm)
        ways = get_args(Channels)
        check(self.channels in ways, "data.channels", f"one of {', '.join(ways)}", self.channels)
        check(0 <= self.workers <= 10_000, "data.workers", "in 0 .. 10,000", self.workers)
        check(0 <= self.max_unreadable <= 1, "data.max_unreadable", "in [0, 1]", self.max_unreadable)
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

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of the largest sample: [C,H,W], [samples] or [T]."""
        front = self.model.front
        if isinstance(front, ImageFront):
            return front.channels, front.height, front.width
        if isinstance(front, TextFront):
            return (self.data.block,)
        return (int(self.data.max_seconds * front.sample_rate),)

    @property
    def sample_units(self) -> float:
        """The largest sample in the unit of `data.batch`: a picture, a block of text, seconds of speech."""
        return self.data.max_seconds if self.model.modality == "audio" else 1
