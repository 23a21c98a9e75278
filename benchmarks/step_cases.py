"""What whole-step benchmarks run: batches by device, variants, and the configs these make of a preset.

Layer drop is 0 everywhere: a step that skips blocks at random takes another time at every turn. Everything
else is the preset's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from d2v.config.fronts import ImageFront, TextFront
from d2v.config.model import ModelConfig
from d2v.config.presets import preset as load_preset
from d2v.config.run import Config
from d2v.tools.flops import step_flops

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Size:
    """Samples of a step; how long they are where that is free."""

    batch: int
    seconds: float = 0.0
    tokens: int = 0


CASES: dict[str, dict[str, Size]] = {
    "cpu": {"image": Size(1), "audio": Size(2, seconds=5.0), "text": Size(2, tokens=256)},
    "cuda": {"image": Size(64), "audio": Size(16, seconds=15.6), "text": Size(16, tokens=512)},
    "smoke": {"image": Size(2), "audio": Size(2, seconds=0.5), "text": Size(2, tokens=24)},
}
"""by device; smoke: toy sizes, to see that everything works"""

ORIGINAL_MATMUL = 204e9
ORIGINAL = {
    "image_base": {"seconds": 3.41, "MiB": 3107},
    "audio_base": {"seconds": 13.05, "MiB": 5416},
    "text_base": {"seconds": 16.55, "MiB": 6273},
}
"""The original code at the CPU's sizes in fp32, on two threads of an idle machine whose measured fp32 matmul
rate is `ORIGINAL_MATMUL` FLOP/s."""


@dataclass(frozen=True)
class Variant:
    """One way to run the training step."""

    backend: str
    """of d2vkern; "auto": what it chooses by itself"""
    compile: bool = False
    cuda_graph: bool = False
    ours: bool = True
    """False: what we hold ourselves against"""


VARIANTS = {
    "eager": Variant("eager", ours=False),
    "compile": Variant("eager", compile=True, ours=False),
    "auto": Variant("auto"),
    "auto_compile": Variant("auto", compile=True),
    "cuda_graph": Variant("auto", cuda_graph=True),
}
"""Eager is what the losses and times of the others are held against."""

DEFAULT_VARIANTS = {"cpu": ["eager", "auto", "compile"], "cuda": ["eager", "auto", "compile", "cuda_graph"]}


@dataclass(frozen=True)
class Case:
    """One preset, precision and variant at one batch."""

    preset: str
    precision: Precision
    variant: str
    device: str
    batch: int
    smoke: bool = False
    threads: int | None = None
    """of the CPU; None: torch's choice"""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.preset, self.precision, self.variant

    @property
    def how(self) -> Variant:
        return VARIANTS[self.variant]

    def config(self) -> Config:
        """The preset's, with this case's precision and variant."""
        cfg = load_preset(self.preset)
        train = dataclasses.replace(
            cfg.train,
            precision=self.precision,
            device=self.device,
            compile=self.how.compile,
            cuda_graph=self.how.cuda_graph,
        )
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, layerdrop=0.0), train=train)

    def checkable_config(self) -> Config:
        """The config whose first losses and gradient norms tell whether the steps are right.

        Nothing is random but masks and decoder noise, which follow from seeds; the learning rate does not
        start at 0, and the teacher follows the student so fast that a forgotten update shows.
        """
        cfg = self.config()
        return dataclasses.replace(
            cfg,
            model=without_dropout(cfg.model),
            optim=dataclasses.replace(cfg.optim, lr=0.1 * cfg.optim.lr, schedule="constant", warmup=0),
            ema=dataclasses.replace(cfg.ema, decay=0.5, end_decay=0.5),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a step's source: [B,C,H,W], [B,samples] or [B,T]."""
        model = load_preset(self.preset).model
        front, size = model.front, size_of(self.preset, self.device, self.smoke)
        if isinstance(front, ImageFront):
            return self.batch, front.channels, front.height, front.width
        if isinstance(front, TextFront):
            return self.batch, size.tokens
        return self.batch, int(size.seconds * front.sample_rate)

    @property
    def flops(self) -> int:
        """Model FLOPs of a step."""
        return step_flops(load_preset(self.preset).model, self.shape)

    @property
    def original(self) -> dict[str, float] | None:
        """The original's seconds, share of its machine's matmul rate and peak MiB at this very batch."""
        known = ORIGINAL.get(self.preset)
        if known is None or self.device != "cpu" or self.smoke:
            return None
        return known | {"share": self.flops / known["seconds"] / ORIGINAL_MATMUL}


def size_of(preset: str, device: str, smoke: bool = False) -> Size:
    """The batch at which a preset is measured."""
    return CASES["smoke" if smoke else device][load_preset(preset).model.modality]


def without_dropout(model: ModelConfig) -> ModelConfig:
    """The model without anything that torch's generators decide: no dropout, no layer drop."""
    drops = [f.name for f in dataclasses.fields(model) if f.name.endswith(("dropout", "layerdrop"))]
    changes: dict[str, Any] = dict.fromkeys(drops, 0.0)
    changes["decoder"] = dataclasses.replace(model.decoder, input_dropout=0.0)
    if isinstance(model.front, TextFront):
        changes["front"] = dataclasses.replace(model.front, dropout=0.0)
    return dataclasses.replace(model, **changes)
