"""Labelled data and settings for fine-tuning runs of a few steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import d2v
from d2v.config.recipes import recipe, with_drops
from d2v.config.tune import FineTuneConfig
from tests.d2v.tiny_runs import LINES

RECIPES = {"image": "image_tiny", "audio": "speech_tiny", "text": "text_tiny"}
LETTERS = {"A": 300, "B": 900}
"""letter -> frequency in Hz of the sound that says it"""


def labelled(modality: str, folder: Path) -> str:
    """Data that a few steps can learn: stripes across or along, texts of two topics, tones that spell."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    if modality == "image":
        rows, columns = np.mgrid[:24, :24] / 24
        labels = np.arange(80) % 2
        phase = rng.random(80)
        waves = [
            np.sin(2 * np.pi * (3 * (columns if k else rows) + p)) for k, p in zip(labels, phase, strict=True)
        ]
        np.savez(folder / "x.npz", images=np.uint8(127 * (1 + np.stack(waves)))[..., None], labels=labels)
        return str(folder / "x.npz")
    if modality == "text":
        for part, count in (("train", 40), ("dev", 16)):
            lines = [
                {"text": f"{LINES[i % 2 * 2]} {i}", "label": ("cat", "token")[i % 2]} for i in range(count)
            ]
            (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return str(folder)
    for part, count in (("train", 24), ("dev", 6)):
        (folder / part).mkdir()
        for i in range(count):
            word = "".join(rng.choice(list(LETTERS), 3))
            t = np.arange(4_800) / 16_000
            tones = [np.concatenate([np.sin(2 * np.pi * LETTERS[c] * t), np.zeros(1_600)]) for c in word]
            soundfile.write(folder / part / f"{i}.wav", 0.3 * np.concatenate(tones), 16_000)
            (folder / part / f"{i}.txt").write_text(word)
    return str(folder)


def config(encoder: Path, modality: str, *, name: str | None = None, **train: Any) -> FineTuneConfig:
    """The tiny recipe, or that of `name`, a few steps, with dropout."""
    name = name or RECIPES[modality]
    cfg = recipe(name).on(name, d2v.load(encoder).cfg)
    cfg = dataclasses.replace(
        cfg,
        train=dataclasses.replace(
            cfg.train,
            **{"device": "cpu", "steps": 6, "evaluate_every": 4, "save_every": 100, "log_every": 1, **train},
        ),
        optim=dataclasses.replace(cfg.optim, warmup=0, lr=3e-3),
        drop=dataclasses.replace(cfg.drop, dropout=0.1, layer=0.1),
        augment=dataclasses.replace(cfg.augment, mixup=0.3, rand_ops=int(modality == "image"), erase=0.2),
        data=dataclasses.replace(cfg.data, batch={"image": 16, "audio": 8, "text": 8}[modality], block=24),
    )
    return with_drops(cfg)
