"""Recipes of fine-tuning by name: everything but the encoder. Each value is its source's.

ImageNet: fairseq, examples/data2vec/config/vision/finetuning/mae_imagenet_{,large_,huge_}clean.yaml and the
defaults of models/mae_image_classification.py. Librispeech: examples/wav2vec/config/finetuning/{base,vox}_*,
with utterances normalised as data2vec 2.0 needs them (the yamls of the base sizes say otherwise and crash).
GLUE: examples/data2vec/config/v2/text_finetuning/*.yaml. The tiny ones are ours, for two CPU cores. Values
that are defaults stand in run.py and tune.py alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from .fronts import LogMelFront
from .model import ModelConfig
from .presets import made_by_name
from .run import DataConfig, OptimConfig
from .tune import (
    AugmentConfig,
    DropConfig,
    FineTuneConfig,
    HeadConfig,
    SpanConfig,
    Task,
    TuneConfig,
    tuned_model_config,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A `FineTuneConfig` without the encoder."""

    head: HeadConfig
    optim: OptimConfig
    train: TuneConfig
    data: DataConfig
    drop: DropConfig = field(default_factory=DropConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    span: SpanConfig = field(default_factory=SpanConfig)
    glue: str | None = None

    def on(self, name: str, model: ModelConfig) -> FineTuneConfig:
        """The config of a run of this recipe from an encoder of config `model`."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        return with_drops(FineTuneConfig(recipe=name, model=model, **mine))


def with_drops(cfg: FineTuneConfig) -> FineTuneConfig:
    """With the dropouts of `drop` in the encoder's config."""
    return replace(cfg, model=tuned_model_config(cfg.model, cfg.drop))


def imagenet(size: str) -> Recipe:
    """Base: 100 epochs of batches of 512, 32 pictures on each of 16 GPUs; large and huge: 50."""
    base = size == "base"
    lr = 1e-3 if base else 5e-4
    return Recipe(
        head=HeadConfig(task="classify"),
        optim=OptimConfig(lr=lr, clip=None if base else 4.0, warmup=16_000,
                          min_lr={"base": 1e-6, "large": 1e-7, "huge": 1e-20}[size]),
        drop=DropConfig(path=0.1 if base else 0.2),
        augment=AugmentConfig(rand_ops=2, erase=0.25, mixup=0.7, cutmix=1.0, mix_probability=0.9,
                              mix_batch=32, label_smoothing=0.1),
        data=DataConfig(batch=512, workers=8, crop_scale=(0.08, 1.0)),
        train=TuneConfig(steps=250_200 if base else 125_200, layer_decay=0.65 if base else 0.75,
                         precision="bf16", evaluate_every=2_502, save_every=2_502, log_every=50),
    )  # fmt: skip


# labels -> steps, peak learning rate, time mask, channel mask, frozen steps, layer drop, batch in seconds
_SPEECH = {
    "base": {
        "10m": (13_000, 5e-5, 0.65, 0.25, 10_000, 0.1, 1_600),
        "1h": (13_000, 5e-5, 0.65, 0.25, 10_000, 0.1, 1_600),
        "10h": (20_000, 5e-5, 0.65, 0.5, 10_000, 0.05, 1_600),
        "100h": (80_000, 3e-5, 0.65, 0.5, 0, 0.1, 1_600),
        "960h": (320_000, 1e-4, 0.5, 0.1, 0, 0.1, 1_600),
    },
    "large": {
        "10m": (13_000, 1e-4, 0.65, 0.25, 10_000, 0.1, 1_600),
        "1h": (13_000, 3e-4, 0.75, 0.25, 10_000, 0.1, 1_600),
        "10h": (20_000, 1e-4, 0.75, 0.25, 10_000, 0.1, 1_600),
        "100h": (80_000, 3e-5, 0.5, 0.5, 10_000, 0.1, 1_600),
        "960h": (320_000, 3e-5, 0.5, 0.25, 10_000, 0.1, 1_920),
    },
}  # fmt: skip


def librispeech(size: str, hours: str) -> Recipe:
    """CTC on letters; batch in seconds over all processes of the original.

    base_960h.yaml had a learning rate of 1e-5 while its task was called audio_pretraining, and has 1e-4 since
    that is audio_finetuning, as in the fairseq that data2vec 2.0 came with: 1e-4 here.
    """
    steps, lr, time, channel, frozen, layer, batch = _SPEECH[size][hours]
    return Recipe(
        head=HeadConfig(task="ctc"),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.98), weight_decay=0.0, schedule="tri_stage"),
        drop=DropConfig(activation=0.1, layer=layer),
        span=SpanConfig(time_prob=time, channel_prob=channel),
        data=DataConfig(batch=batch, workers=6, max_seconds=35.0, min_seconds=0.1, pad=True),
        train=TuneConfig(steps=steps, freeze_steps=frozen, freeze_front=True, precision="bf16",
                         log_every=50),
    )  # fmt: skip


# steps, warm-up, batch, learning rate
_GLUE = {
    "cola": (5_336, 320, 16, 2e-5), "sst2": (20_935, 1_256, 32, 2e-5), "mrpc": (2_296, 137, 16, 2e-5),
    "stsb": (3_598, 214, 16, 4e-5), "qqp": (113_272, 6_796, 32, 2e-5), "mnli": (123_873, 7_432, 32, 2e-5),
    "qnli": (33_112, 1_986, 32, 2e-5), "rte": (2_036, 122, 16, 2e-5),
}  # fmt: skip


def glue(task: str) -> Recipe:
    """Ten epochs, learning rate to 0 on a line, 6% warm-up (of QQP too, whose yaml has 25%)."""
    steps, warmup, batch, lr = _GLUE[task]
    return Recipe(
        head=HeadConfig(task="sentence", regression=task == "stsb"),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, schedule="polynomial",
                          warmup=warmup),
        drop=DropConfig(dropout=0.1, attention=0.1),
        data=DataConfig(batch=batch, workers=1),
        train=TuneConfig(steps=steps, precision="bf16", evaluate_every=max(1, steps // 10),
                         save_every=max(1, steps // 10), log_every=50),
        glue=task,
    )  # fmt: skip


def image_tiny() -> Recipe:
    """For `image_tiny` on `digits`: minutes on two CPU cores."""
    return Recipe(
        head=HeadConfig(task="classify"),
        optim=OptimConfig(clip=4.0, warmup=50),
        drop=DropConfig(path=0.05),
        augment=AugmentConfig(label_smoothing=0.1),
        data=DataConfig(batch=64, flip=False, crop_scale=(0.7, 1.0)),
        train=TuneConfig(steps=600, layer_decay=0.75, evaluate_every=200, save_every=200),
    )


def speech_tiny() -> Recipe:
    """CTC for `audio_tiny`: minutes on two CPU cores."""
    return Recipe(
        head=HeadConfig(task="ctc"),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, clip=4.0, schedule="tri_stage"),
        span=SpanConfig(time_prob=0.2, time_length=5, channel_prob=0.1, channel_length=8),
        data=DataConfig(batch=30, max_seconds=15.0, min_seconds=0.2, pad=True),
        train=TuneConfig(steps=600, evaluate_every=200, save_every=200),
    )


def sound_tiny() -> Recipe:
    """Classes of utterances for `audio_tiny`."""
    return replace(
        speech_tiny(),
        head=HeadConfig(task="classify"),
        span=SpanConfig(),
        data=DataConfig(batch=20, pad=True),
    )


def text_tiny() -> Recipe:
    """Classes of sentences for `text_tiny`: minutes on two CPU cores."""
    return Recipe(
        head=HeadConfig(task="sentence"),
        optim=OptimConfig(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, clip=1.0,
                          schedule="polynomial", warmup=50),
        drop=DropConfig(dropout=0.1),
        data=DataConfig(batch=32, block=128),
        train=TuneConfig(steps=600, evaluate_every=200, save_every=200),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{f"imagenet_{size}": lambda size=size: imagenet(size) for size in ("base", "large", "huge")},  # type: ignore[misc]
    **{
        f"librispeech_{hours}_{size}": lambda size=size, hours=hours: librispeech(size, hours)  # type: ignore[misc]
        for size, some in _SPEECH.items() for hours in some
    },
    **{f"glue_{task}": lambda task=task: glue(task) for task in _GLUE},  # type: ignore[misc]
    "image_tiny": image_tiny,
    "speech_tiny": speech_tiny,
    "sound_tiny": sound_tiny,
    "text_tiny": text_tiny,
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe called `name`; an unknown one raises ValueError with the nearest names."""
    return made_by_name(RECIPES, name, "finetune: no recipe")


def default_recipe(task: Task, model: ModelConfig) -> str:
    """The recipe for a task and an encoder of this size, where nothing else is known."""
    small, large = model.dim < 512, model.dim > 768
    if task == "classify":
        if model.modality == "audio":
            return "sound_tiny"
        return "image_tiny" if small else f"imagenet_{'large' if large else 'base'}"
    if task == "sentence":
        return "text_tiny" if small else "glue_sst2"
    if small or isinstance(model.front, LogMelFront):
        return "speech_tiny"
    return f"librispeech_100h_{'large' if large else 'base'}"
