"""The tiny presets shrunk further, and data for them: runs of a few milliseconds a step."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from d2v.config.presets import preset
from d2v.config.run import Config
from d2v.config.tune import FineTuneConfig
from d2v.evaluate.online_probe import OnlineProbe
from d2v.evaluate.scores import evaluate
from d2v.formats.open import open_encoder
from d2v.train import finetune, pretrain

# as the command line calls them
run = functools.partial(pretrain.run, probe=OnlineProbe)
resume_finetune = functools.partial(finetune.resume_finetune, evaluate=evaluate)

LINES = [
    "the cat sat on the mat and looked at the rain",
    "a run that was stopped can be continued exactly",
    "every token that is masked must be predicted from the others",
    "speech, images and text are read by the same encoder",
]


def tiny(modality: str, *, steps: int = 6, batch: int | None = None, **sections: dict[str, Any]) -> Config:
    """`<modality>_tiny` at width 16. sections: model=, optim=, data=, train= with values to replace."""
    cfg = preset(f"{modality}_tiny")
    model = dataclasses.replace(
        cfg.model,
        dim=16,
        heads=2,
        depth=2,
        target=dataclasses.replace(cfg.model.target, top_k=2),
        decoder=dataclasses.replace(
            cfg.model.decoder, dim=16, groups=1 if modality == "text" else 2, layers=2
        ),
    )
    size = {"image": 8, "audio": 4, "text": 4}[modality] if batch is None else batch
    data: dict[str, Any] = {"batch": size}
    if modality == "audio":
        front = dataclasses.replace(model.front, mels=8, position_groups=2)
        model = dataclasses.replace(model, front=front)
        data |= {"max_seconds": 1.0, "min_seconds": 0.3}
    if modality == "text":
        model = dataclasses.replace(
            model, front=dataclasses.replace(model.front, vocab_size=320, max_positions=32)
        )
        data |= {"block": 24}
    train = {"steps": steps, "log_every": 1, "save_every": 1_000, "alarm_after": 1_000, "device": "cpu"}
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(model, **sections.get("model", {})),
        data=dataclasses.replace(cfg.data, **{**data, **sections.get("data", {})}),
        optim=dataclasses.replace(cfg.optim, **{"warmup": 2, **sections.get("optim", {})}),
        train=dataclasses.replace(cfg.train, **{**train, **sections.get("train", {})}),
    )
    return cfg


def make_data(modality: str, folder: Path) -> str:
    """A data set of the modality: a few files in `folder`; an epoch is 5 steps of images."""
    folder.mkdir(parents=True, exist_ok=True)
    if modality == "image":
        rows, columns = np.mgrid[:24, :24] / 24
        waves = [np.sin(2 * np.pi * (n % 7 * rows + n % 5 * columns + n / 40)) for n in range(40)]
        np.savez(folder / "images.npz", images=np.uint8(127 * (1 + np.stack(waves)))[..., None])
        return str(folder / "images.npz")
    if modality == "text":
        for number in range(4):
            text = "\n".join(f"{number} {line}" for line in LINES * 12)
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
        return str(folder)
    rng = np.random.default_rng(0)
    for number in range(24):
        seconds = 0.5 + 0.03 * number
        t = np.arange(int(16_000 * seconds)) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * (200 + 40 * number) * t) + 0.05 * rng.standard_normal(t.size)
        soundfile.write(folder / f"{number:02d}.wav", wave.astype(np.float32), 16_000)
    return str(folder)


def run_finetune(
    cfg: FineTuneConfig, encoder: str | Path, data: str, out: Path, **rest: Any
) -> finetune.TuneResult:
    """As the command line calls it: the encoder opened first, unless it is given."""
    rest = {"evaluate": evaluate, **rest}
    if "opened" not in rest:
        rest["opened"] = open_encoder(encoder)
    return finetune.run_finetune(cfg, encoder, data, out, **rest)
