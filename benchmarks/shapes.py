"""Shapes of the ops inside a preset's training step: widths and token counts from `d2v.config.presets`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import d2vkern
from d2v.config.fronts import ImageFront, TextFront
from d2v.config.model import ModelConfig
from d2v.config.presets import preset as load_preset

Size = Literal["smoke", "cpu", "gpu"]

# (samples, seconds of audio, tokens of text) of a micro-batch. gpu: those that the goals per op are stated
# for; cpu: one sample, as long as on the GPU.
BATCHES: dict[Size, dict[str, tuple[int, float, int]]] = {
    "smoke": {"image": (1, 0, 0), "audio": (1, 0.5, 0), "text": (1, 0, 24)},
    "cpu": {"image": (1, 0, 0), "audio": (1, 12.0, 0), "text": (1, 0, 512)},
    "gpu": {"image": (16, 0, 0), "audio": (5, 12.0, 0), "text": (16, 0, 512)},
}
LONG_AUDIO: dict[Size, tuple[int, float]] = {"smoke": (1, 0.5), "cpu": (1, 15.6), "gpu": (16, 15.6)}
"""(samples, seconds) of the whole audio step, where the speech front end and its positions dominate"""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """One preset at one batch: B samples, M masks, N = B * M rows, T tokens, K kept, E extra, S = E + K."""

    preset: str
    cfg: ModelConfig
    batch: int
    samples: int
    """audio: samples of waveform; 0 otherwise"""
    block: int
    """text: tokens; 0 otherwise"""

    @property
    def tokens(self) -> int:
        """T."""
        front = self.cfg.front
        if isinstance(front, ImageFront):
            return front.grid[0] * front.grid[1]
        return self.block if isinstance(front, TextFront) else front.frames(self.samples)

    @property
    def clones(self) -> int:
        """M."""
        return self.cfg.mask.clones

    @property
    def rows(self) -> int:
        """N."""
        return self.batch * self.clones

    @property
    def extra(self) -> int:
        """E."""
        return self.cfg.front.extra_tokens

    @property
    def kept(self) -> int:
        """K, as the samplers count (audio counts the masked ones)."""
        prob = self.cfg.mask.prob
        if self.cfg.modality == "audio":
            return self.tokens - int(self.tokens * prob)
        return int(self.tokens * (1.0 - prob))

    @property
    def seen(self) -> int:
        """S."""
        return self.extra + self.kept

    @property
    def masked(self) -> int:
        """T - K."""
        return self.tokens - self.kept

    def plan(self, ids: Tensor, seed: int = 1, backend: str | None = None) -> d2vkern.MaskPlan:
        """The preset's masks of samples `ids` [B]."""
        mask, front = self.cfg.mask, self.cfg.front
        block: dict[str, Any] = {"prob": mask.prob, "length": mask.length, "adjust": mask.adjust}
        keyed: dict[str, Any] = {"seed": seed, "backend": backend}
        if isinstance(front, ImageFront):
            return d2vkern.inverse_block_mask(ids, mask.clones, front.grid, **block, **keyed)
        if isinstance(front, TextFront):
            return d2vkern.random_mask(ids, mask.clones, self.tokens, prob=mask.prob, **keyed)
        return d2vkern.span_mask(ids, mask.clones, self.tokens, **block, **keyed)

    def random_plan(self, device: torch.device) -> d2vkern.MaskPlan:
        """The preset's masks of random samples, always from the eager backend."""
        return self.plan(torch.randint(2**40, (self.batch,)).to(device), backend="eager")

    def longer(self, size: Size) -> Shapes:
        """The audio preset at the batch of the whole step."""
        batch, seconds = LONG_AUDIO[size]
        return replace(self, batch=batch, samples=int(seconds * self.cfg.front.sample_rate))  # type: ignore[union-attr]


def shapes(preset: str, size: Size) -> Shapes:
    """The preset's shapes at a size."""
    cfg = load_preset(preset).model
    batch, seconds, block = BATCHES[size][cfg.modality]
    samples = 0
    if not isinstance(cfg.front, (ImageFront, TextFront)):
        samples = int(seconds * cfg.front.sample_rate)
    return Shapes(preset=preset, cfg=cfg, batch=batch, samples=samples, block=block)


def parameter_shapes(preset: str) -> list[tuple[int, ...]]:
    """Shapes of the trained parameters that the preset's teacher averages, without allocating a model."""
    from d2v.model import Data2Vec

    with torch.device("meta"):
        _, student = Data2Vec(load_preset(preset).model).teacher_pairs()
    return [tuple(p.shape) for p in student if p.requires_grad]


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    """N(0, std), drawn on the device in fp32."""
    return torch.randn(shape, device=device).mul_(std).to(dtype)
