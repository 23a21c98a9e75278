"""Augmentation of labelled pictures, batched on the device: RandAugment and erasing by kornia, mixing here.

Mixup and cutmix draw one lambda per picture from Beta(alpha, alpha), as in timm's elementwise mode;
kornia's mixup draws it uniformly. Randomness comes from torch's global generators, in the order of the steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Batch
from ..data.image import ImageSource
from ..data.loading import Source
from .config import AugmentConfig

GROUP = 16
"""pictures that share the operations of RandAugment; their directions are drawn one by one"""


class AugmentedImages(Source):
    """Training pictures, cropped and flipped as `ImageSource` does, then augmented."""

    def __init__(self, source: ImageSource, augment: AugmentConfig) -> None:
        super().__init__(source.path, source.seed, source.batch)
        if augment.rand_ops and source.store.floating:
            raise ValueError(
                "finetune: augment.rand_ops must be 0 for float pictures, whose range is unknown"
            )
        self.source, self.augment, self.meta = source, augment, source.meta

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
        pixels = self.source.pixels(batch)
        if self.augment.rand_ops:
            pixels = rand_augment(pixels, self.augment.rand_ops, self.augment.rand_magnitude)
        pixels = self.source.normalise(pixels)
        if self.augment.erase:
            pixels = erase(pixels, self.augment.erase)
        return replace(batch, source=pixels, extra={})


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


def mix(source: Tensor, labels: Tensor, outputs: int, augment: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) of a batch with itself reversed.

    source: [B,C,H,W]. labels: [B] int64. Returns the mixed pictures and soft labels [B,outputs] fp32, label
    smoothing included (timm's mixup_target).
    """
    smooth = augment.label_smoothing
    soft = F.one_hot(labels, outputs).float() * (1 - smooth) + smooth / outputs
    if not (augment.mixup or augment.cutmix) or float(torch.rand(())) >= augment.mix_probability:
        return source, soft
    cut = bool(augment.cutmix) and (not augment.mixup or float(torch.rand(())) < augment.mix_switch)
    alpha = augment.cutmix if cut else augment.mixup
    size = len(source)
    kept = torch.distributions.Beta(alpha, alpha).sample((size,)).to(source.device)
    if cut:
        outside = _outside(kept, *source.shape[2:])
        mixed = torch.where(outside.unsqueeze(1), source, source.flip(0))
        kept = outside.flatten(1).float().mean(1)
    else:
        share = kept.view(-1, 1, 1, 1).to(source.dtype)
        mixed = source * share + source.flip(0) * (1 - share)
    return mixed, soft * kept.unsqueeze(1) + soft.flip(0) * (1 - kept.unsqueeze(1))


def _outside(kept: Tensor, height: int, width: int) -> Tensor:
    """[B,H,W] bool: all but a box with about 1 - kept of the area, centred anywhere, cut at the border."""
    side = (1 - kept).sqrt()

    def inside(size: int) -> Tensor:
        centre = torch.rand(len(kept), device=kept.device) * size
        half = side * size / 2
        place = torch.arange(size, device=kept.device) + 0.5
        return (place - centre.unsqueeze(1)).abs() < half.unsqueeze(1)

    return ~(inside(height).unsqueeze(2) & inside(width).unsqueeze(1))


def soft_cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """0-dim: summed over the samples. logits, soft: [B,outputs]."""
    return -(soft * logits.log_softmax(-1)).sum()
