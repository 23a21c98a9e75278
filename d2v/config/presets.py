"""Presets: the published models by the paper's names, and tiny ones that learn on two CPU cores.

Values of the published presets come from fairseq, examples/data2vec/config/v2 (the yaml is named in
each docstring); what a yaml does not state comes from the dataclass defaults in
examples/data2vec/models/data2vec2.py and models/modalities/*.py. Values that are the defaults in model.py and
run.py, image_base's for the most part, stand there alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from .fronts import ImageFront, LogMelFront, TextFront, WaveformFront
from .model import DecoderConfig, MaskConfig, ModelConfig, TargetConfig
from .run import Config, DataConfig, EMAConfig, OptimConfig, TrainConfig

T = TypeVar("T")


_NO_DROPOUT: dict[str, Any] = {"encoder_dropout": 0.0, "attention_dropout": 0.0, "post_mlp_dropout": 0.0}


def _image(**kwargs: Any) -> ModelConfig:
    """What all image models share: no dropout anywhere, a CLS loss (over the rows of a GPU in the original:
    its pictures times their masks)."""
    return ModelConfig(**{"norm_eps": 1e-6, "cls_loss": 0.01, **_NO_DROPOUT, **kwargs})


def _optim(**kwargs: Any) -> OptimConfig:
    """What all speech and text models share."""
    return OptimConfig(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, **kwargs)


def _train(steps: int) -> TrainConfig:
    """What all published models share."""
    return TrainConfig(steps=steps, precision="bf16", save_every=5_000, log_every=50, alarm_after=5_000)


_TEXT_DECODER = DecoderConfig(
    groups=1, kernel=9, layers=5, residual=False, projection_layers=2, input_dropout=0.1
)


def image_base() -> Config:
    """ViT-B/16 on 224x224, 16 masks. Source: base_images_only_task.yaml (16 images x 16 GPUs).

    d2v train image_base --data imagenet/train --out runs/image_base
    """
    return Config(
        preset="image_base",
        model=_image(
            front=ImageFront(),
            target=TargetConfig(final="layer"),
            prenet_depth=2, depth=10, cls_rows=16 * 16,
        ),
        optim=OptimConfig(clip=4.0, warmup=50_040),
        data=DataConfig(workers=8),
        train=_train(375_300),
    )  # fmt: skip


def image_large() -> Config:
    """ViT-L/16; 86.8% ImageNet top-1 after fine-tuning in the paper.

    Source: large_images_only_task.yaml (8 images x 16 GPUs).

    d2v train image_large --data imagenet/train --out runs/image_large
    """
    return Config(
        preset="image_large",
        model=_image(
            front=ImageFront(),
            mask=MaskConfig(prob=0.75, adjust=0.1),
            decoder=DecoderConfig(dim=1024, kernel=5, layers=3),
            target=TargetConfig(top_k=18, final="layer"),
            dim=1024, heads=16, depth=24, cls_rows=8 * 16,
        ),
        optim=OptimConfig(lr=4e-4, clip=4.0, warmup=50_040),
        ema=EMAConfig(anneal=150_000),
        data=DataConfig(batch=128, workers=8),
        train=_train(375_300),
    )  # fmt: skip


def image_huge14() -> Config:
    """ViT-H/14; 87.4% ImageNet top-1 in the paper's follow-up tables.

    Source: huge_images14_only_task.yaml (8 images x 32 GPUs).

    d2v train image_huge14 --data imagenet/train --out runs/image_huge14
    """
    return Config(
        preset="image_huge14",
        model=_image(
            front=ImageFront(patch=14),
            mask=MaskConfig(prob=0.75, adjust=0.1),
            decoder=DecoderConfig(dim=1024, kernel=5, layers=3),
            target=TargetConfig(top_k=24, final="layer"),
            dim=1280, heads=16, depth=32, cls_rows=8 * 16,
        ),
        optim=OptimConfig(lr=4e-4, clip=4.0, warmup=50_040),
        ema=EMAConfig(end_decay=1.0, anneal=300_000),
        data=DataConfig(workers=8),
        train=_train(500_000),
    )  # fmt: skip


def image_tiny() -> Config:
    """0.2 M parameters on 24x24 grey images; minutes on two CPU cores with `--data digits`.

    d2v train image_tiny --data digits --out runs/image_tiny
    """
    return Config(
        preset="image_tiny",
        model=_image(
            front=ImageFront(height=24, width=24, patch=4, channels=1),
            mask=MaskConfig(prob=0.7, clones=8),
            decoder=DecoderConfig(dim=64, groups=8, layers=3),
            target=TargetConfig(top_k=3, final="layer"),
            dim=64, heads=4, depth=4, cls_loss=0.0, cls_rows=16 * 8, init_std=0.07,
        ),
        optim=OptimConfig(lr=5e-3, clip=4.0, warmup=100),
        ema=EMAConfig(decay=0.99, end_decay=0.9995, anneal=2_000),
        data=DataConfig(batch=16, flip=False, crop_scale=(1.0, 1.0)),
        train=TrainConfig(steps=2_400, save_every=800),
    )  # fmt: skip


def audio_base() -> Config:
    """12 blocks on the raw waveform; 6.4% WER with 100 h of labels and a 4-gram in the paper.

    Source: base_audio_only_task.yaml (62.5 s x 8 GPUs).

    d2v train audio_base --data librispeech --out runs/audio_base
    """
    return Config(
        preset="audio_base",
        model=ModelConfig(
            front=WaveformFront(),
            mask=MaskConfig(prob=0.5, length=5, adjust=0.05, clones=8),
            decoder=DecoderConfig(dim=384, kernel=7, layers=4, input_dropout=0.1),
            target=TargetConfig(top_k=8),
            prenet_dropout=0.1, layerdrop=0.05,
        ),
        optim=_optim(lr=7.5e-4, warmup=8_000),
        ema=EMAConfig(decay=0.999, anneal=75_000),
        data=DataConfig(batch=500, workers=8, max_seconds=20.0, min_seconds=2.0),
        train=_train(400_000),
    )  # fmt: skip


def audio_large() -> Config:
    """8 + 16 blocks of width 1024. Source: large_audio_only_task.yaml (20 s x 48 GPUs).

    d2v train audio_large --data librivox --out runs/audio_large
    """
    return Config(
        preset="audio_large",
        model=ModelConfig(
            front=WaveformFront(),
            mask=MaskConfig(prob=0.55, length=5, adjust=0.1, clones=12),
            decoder=DecoderConfig(kernel=7, layers=4, input_dropout=0.1),
            target=TargetConfig(top_k=16),
            dim=1024, heads=16, prenet_depth=8, depth=16, prenet_dropout=0.1,
        ),
        optim=_optim(lr=4e-4, clip=1.0, warmup=10_000),
        ema=EMAConfig(decay=0.9997, end_decay=1.0, anneal=300_000),
        data=DataConfig(batch=960, workers=8, max_seconds=20.0, min_seconds=2.0),
        train=_train(600_000),
    )  # fmt: skip


def audio_tiny() -> Config:
    """4 blocks of width 96 on **log-mel frames, not on the waveform**; minutes on two CPU cores.

    A learned waveform front end collapses at this size while the loss falls and the target variance
    rises (fairseq issue 5239), so this preset learns from `LogMelFront`; `audio_base` is the real one.

    d2v train audio_tiny --data speech --out runs/audio_tiny
    """
    return Config(
        preset="audio_tiny",
        model=ModelConfig(
            front=LogMelFront(position_groups=8, position_layers=2, position_width=38),
            mask=MaskConfig(prob=0.5, length=5, adjust=0.05, clones=8),
            decoder=DecoderConfig(dim=96, groups=8, kernel=7, layers=3),
            target=TargetConfig(top_k=3),
            dim=96, heads=4, depth=4, **_NO_DROPOUT,
            init_std=0.06,
        ),
        optim=_optim(lr=2e-3, clip=4.0, warmup=50),
        ema=EMAConfig(decay=0.998, end_decay=0.9999, anneal=1_000),
        data=DataConfig(batch=12, max_seconds=2.0),
        train=TrainConfig(steps=500, save_every=250),
    )  # fmt: skip


def text_base() -> Config:
    """12 blocks, RoBERTa's vocabulary. Source: base_text_only_task.yaml.

    4 blocks of 512 tokens x 16 GPUs.

    d2v train text_base --data books --data.tokenizer gpt2 --out runs/text_base
    """
    return Config(
        preset="text_base",
        model=ModelConfig(
            front=TextFront(),
            mask=MaskConfig(prob=0.48, length=1, adjust=0.0, clones=8),
            decoder=_TEXT_DECODER,
            target=TargetConfig(top_k=12),
            loss_scale=1.0, ema_encoder_only=True,
        ),
        optim=_optim(lr=2e-4, clip=1.0, warmup=4_000),
        ema=EMAConfig(decay=0.9999),
        data=DataConfig(batch=64, workers=4),
        train=_train(1_000_000),
    )  # fmt: skip


def text_large() -> Config:
    """24 blocks of width 1024. Source: large_text_only_task.yaml (2 blocks of 512 tokens x 32 GPUs).

    d2v train text_large --data books --data.tokenizer gpt2 --out runs/text_large
    """
    return Config(
        preset="text_large",
        model=ModelConfig(
            front=TextFront(),
            mask=MaskConfig(prob=0.5, length=1, adjust=0.0, clones=8),
            decoder=_TEXT_DECODER,
            target=TargetConfig(top_k=24, norm="layer", final="instance"),
            dim=1024, heads=16, depth=24, loss_scale=1.0, ema_encoder_only=True,
        ),
        optim=_optim(lr=1e-4, clip=1.0, warmup=4_000),
        ema=EMAConfig(decay=0.9999),
        data=DataConfig(batch=64, workers=4),
        train=_train(600_000),
    )  # fmt: skip


def text_large_1m() -> Config:
    """`text_large` with smooth L1 and a million steps. Source: large_text_only_task_pgrp_1M.yaml.

    Its group of the decoder has the learning rate of all others, so it is not kept apart here.

    d2v train text_large_1m --data books --data.tokenizer gpt2 --out runs/text_large_1m
    """
    cfg = text_large()
    return replace(
        cfg,
        preset="text_large_1m",
        model=replace(cfg.model, loss_beta=4.0),
        train=replace(cfg.train, steps=1_000_000),
    )


def text_tiny() -> Config:
    """3 blocks of width 64 on a byte-level BPE trained on the data; minutes on two CPU cores.

    At this size a masked language model learns more from text than data2vec 2.0 does.

    d2v train text_tiny --data text --out runs/text_tiny
    """
    return Config(
        preset="text_tiny",
        model=ModelConfig(
            front=TextFront(vocab_size=4_096, max_positions=128, dropout=0.0),
            mask=MaskConfig(prob=0.48, length=1, adjust=0.0, clones=4),
            decoder=DecoderConfig(dim=64, groups=1, kernel=5, layers=3, residual=False, projection_layers=2),
            target=TargetConfig(top_k=3),
            dim=64, heads=4, depth=3, **_NO_DROPOUT,
            loss_scale=1.0, ema_encoder_only=True,
        ),
        optim=_optim(clip=1.0, warmup=100),
        ema=EMAConfig(decay=0.998, end_decay=0.9999, anneal=2_000),
        data=DataConfig(batch=16, block=128),
        train=TrainConfig(steps=600, save_every=300),
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        image_tiny, image_base, image_large, image_huge14,
        audio_tiny, audio_base, audio_large,
        text_tiny, text_base, text_large, text_large_1m,
    )
}  # fmt: skip


def made_by_name(known: Mapping[str, Callable[[], T]], name: str, what: str) -> T:
    """What is called `name`; an unknown one raises `ValueError` with the nearest names."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise ValueError(f"{what} {name!r}; nearest: {', '.join(near)}")
    return known[name]()


def preset(name: str) -> Config:
    """The preset called `name`; an unknown one raises `ValueError` with the nearest names."""
    return made_by_name(PRESETS, name, "presets: no preset")
