"""Augmentation of labelled pictures, batched on the device: RandAugment and erasing by kornia, mixing here.

All of it is done over a whole step and keyed by (seed, epoch, first picture of the step), so that it depends
neither on how the step is split into micro-batches nor on what else was drawn.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...config.tune import AugmentConfig
from ..loader import PIXELS, Source, generator, keyed
from ..types import Batch
from .source import ImageSource

GROUP = 16
"""pictures of a step, in its order, that share RandAugment's operations; directions are drawn one by one"""


class AugmentedImages(Source):
    """Training pictures, cropped and flipped as `ImageSource` does, then augmented."""

    def __init__(self, source: ImageSource, augment: AugmentConfig) -> None:
        super().__init__(source.path, source.seed, source.batch, source.window)
        if augment.rand_ops and source.store.floating:
            raise ValueError(
                "finetune: augment.rand_ops must be 0 for float pictures, whose range is unknown"
            )
        self.source, self.augment = source, augment
        self.meta, self.normalisation, self.heard = source.meta, source.normalisation, source.heard

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int, epoch: int | None) -> Any:
        return self.source.read(index, epoch)

    def collate(self, items: list[Any], ids: np.ndarray, epoch: int | None) -> Batch:
        return self.source.collate(items, ids, epoch)

    def finish(self, batch: Batch) -> Batch:
        """source [B,C,H,W] float32, normalised."""
        return self.finish_step([batch])[0]

    def finish_step(self, batches: list[Batch]) -> list[Batch]:
        """source [B,C,H,W] float32, normalised."""
        pixels = joined([self.source.pixels(batch) for batch in batches])
        seed = int(step_generator(self.seed, PIXELS, batches).integers(2**63))
        with keyed(seed, pixels.device):
            if self.augment.rand_ops:
                pixels = rand_augment(pixels, self.augment.rand_ops, self.augment.rand_magnitude)
            pixels = self.source.normalise(pixels)
            if self.augment.erase:
                pixels = erase(pixels, self.augment.erase)
        parts = pixels.split([len(batch) for batch in batches])
        return [replace(batch, source=part, extra={}) for batch, part in zip(batches, parts, strict=True)]


def step_generator(seed: int, use: int, batches: list[Batch]) -> np.random.Generator:
    """A stream for each step of a run, whatever its micro-batches: by its epoch and its first sample."""
    first = batches[0]
    return generator(seed, use, first.epoch, int(first.host_ids[0]))


def joined(parts: list[Tensor]) -> Tensor:
    """One tensor of the parts along their first dimension; of a single part no copy is made."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rand_augment(pixels: Tensor, operations: int, magnitude: int) -> Tensor:
    """RandAugment (Cubuk et al., 2020) of [B,C,H,W] in 0..1; grey pictures have no colour to change."""
    from kornia.augmentation.auto import RandAugment
    from kornia.augmentation.auto.rand_augment.rand_augment import default_policy

    policy = [entry for entry in default_policy if pixels.shape[1] == 3 or entry[0][0] != "color"]
    augment = RandAugment(operations, magnitude, policy, transformation_matrix_mode="skip")
    return torch.cat([augment(part).clamp(0, 1) for part in pixels.split(GROUP)])


def erase(pixels: Tensor, probability: float) -> Tensor:
    """With a probability each, a rectangle of a picture [B,C,H,W] becomes N(0, 1), pixel by pixel.

    Source: Zhong et al., 2020; timm's RandomErasing in pixel mode, with its share of the area (2% to 1/3).
    """
    from kornia.augmentation import RandomErasing

    holes = RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=0.0, p=probability)(
        torch.ones_like(pixels)
    )
    return torch.where(holes > 0, pixels, torch.randn_like(pixels))


def mix(
    source: Tensor, labels: Tensor, outputs: int, augment: AugmentConfig, draws: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) of pictures with the same ones reversed.

    source: [B,C,H,W]. labels: [B] int64. Returns the mixed pictures and the shares of the classes
    [B,outputs] fp32, label smoothing included. Each augment.mix_batch pictures share one draw: whether they
    are mixed, which way, how much of each picture stays, and the box of cutmix.
    Source: timm/data/mixup.py, Mixup in mode "batch", as models/mae_image_classification.py makes it.
    """
    size = augment.mix_batch or max(1, len(source))
    made = [
        _mix_batch(pictures, kinds, outputs, augment, draws)
        for pictures, kinds in zip(source.split(size), labels.split(size), strict=True)
    ]
    return joined([pictures for pictures, _ in made]), joined([shares for _, shares in made])


def _mix_batch(
    source: Tensor, labels: Tensor, outputs: int, augment: AugmentConfig, draws: np.random.Generator
) -> tuple[Tensor, Tensor]:
    kept = 1.0
    if (augment.mixup or augment.cutmix) and draws.random() < augment.mix_probability:
        cut = bool(augment.cutmix) and (not augment.mixup or draws.random() < augment.mix_switch)
        alpha = augment.cutmix if cut else augment.mixup
        kept = float(draws.beta(alpha, alpha))
        if cut:
            source, kept = _cut(source, kept, draws)
        else:
            source = source * kept + source.flip(0) * (1 - kept)
    off = augment.label_smoothing / outputs
    hit = F.one_hot(labels, outputs).bool()
    shares = torch.where(hit, 1 - augment.label_smoothing + off, off)
    return source, shares * kept + shares.flip(0) * (1 - kept)


def _cut(source: Tensor, kept: float, draws: np.random.Generator) -> tuple[Tensor, float]:
    """With a box of the reversed pictures: about 1 - kept of the area, centred anywhere, cut at the border;
    and the share that really stays. Source: timm/data/mixup.py, rand_bbox and cutmix_bbox_and_lam, as the
    original had it: the newest timm gives a box of odd size its last pixel too."""
    height, width = source.shape[2:]
    ratio = math.sqrt(1 - kept)
    edges = []
    for size in (height, width):
        centre, half = int(draws.integers(size)), int(size * ratio) // 2
        edges.append((max(0, centre - half), min(size, centre + half)))
    (top, bottom), (left, right) = edges
    mixed = source.clone()
    mixed[:, :, top:bottom, left:right] = source.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
