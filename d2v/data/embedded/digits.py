"""`digits`: scikit-learn's 1,797 scanned digits as cluttered scenes of 24x24 grey pixels.

Raw, the 8x8 scans are useless for a probe (a nearest neighbour on pixels is right 98.8% of the time).
So each scene holds one digit, scaled, rotated and shifted, among fragments of others and noise, and the
label is the whole digit (pixels then reach 31% with a ridge classifier, 60% with ten nearest
neighbours). Scenes of the test split are made of base digits that no other scene uses, also
as fragments. Everything is a function of the seeds below: the same scenes on any machine, up to one
grey level where float arithmetic rounds differently.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 24
"""pixels of a scene's side"""
TRAIN_BASES = 1_297
"""base digits of the train and probe scenes; the other 500 make the test scenes"""
COUNTS = {"train": 40_000, "probe": 4_000, "test": 4_000}
"""scenes per split"""
FRAGMENTS = 4
"""pieces of other digits in a scene"""
WINDOW = 3
"""side of a piece in pixels of the 8x8 scan"""
CLASSES = [str(i) for i in range(10)]

_SEEDS = {"train": 1, "probe": 2, "test": 3}
_CHUNK = 2_000
"""scenes drawn at a time: bounds memory"""


@functools.lru_cache
def _bases() -> tuple[torch.Tensor, np.ndarray]:
    """Scans [1797,8,8] in [0,1] and their labels, in an order fixed for the train/test cut."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(scans))
    return torch.from_numpy(scans[order].reshape(-1, 8, 8) / 16).float(), labels[order]


def _draw(sprites: torch.Tensor, size: np.ndarray, angle: np.ndarray, centre: np.ndarray) -> torch.Tensor:
    """Sprites [n,8,8] on canvases [n,SIDE,SIDE]: side `size` and place `centre` [n,2] (x, y) in pixels,
    turned by `angle` radians."""
    zoom = SIDE / size
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    offset = centre * 2 / SIDE - 1
    theta = np.stack(
        [
            cos,
            sin,
            -(cos * offset[:, 0] + sin * offset[:, 1]),
            -sin,
            cos,
            sin * offset[:, 0] - cos * offset[:, 1],
        ],
        axis=1,
    ).reshape(-1, 2, 3)
    grid = F.affine_grid(torch.from_numpy(theta).float(), [len(sprites), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(sprites[:, None], grid, align_corners=False)[:, 0]


def _scenes(bases: torch.Tensor, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One scene [SIDE,SIDE] uint8 around each chosen base digit."""
    n = len(chosen)
    size = rng.uniform(12, 20, n)
    reach = rng.uniform(-1, 1, (n, 2)) * ((SIDE - size) / 2)[:, None]
    canvas = _draw(bases[chosen], size, rng.uniform(-math.pi / 9, math.pi / 9, n), SIDE / 2 + reach)

    pieces = n * FRAGMENTS
    others = bases[rng.integers(len(bases), size=pieces)]
    corner = rng.integers(0, 8 - WINDOW + 1, (pieces, 2))
    inside = (np.arange(8) >= corner[..., None]) & (np.arange(8) < corner[..., None] + WINDOW)
    others = others * torch.from_numpy(inside[:, 0, :, None] & inside[:, 1, None, :])
    # the centre of the window goes to a uniform place, whatever the size and turn of the sprite
    size, angle = rng.uniform(10, 16, pieces), rng.uniform(-math.pi, math.pi, pieces)
    local = ((corner[:, ::-1] + WINDOW / 2) / 8 - 0.5) * size[:, None]
    turned = np.stack(
        [np.cos(angle) * local[:, 0] - np.sin(angle) * local[:, 1],
         np.sin(angle) * local[:, 0] + np.cos(angle) * local[:, 1]], axis=1,
    )  # fmt: skip
    drawn = _draw(others, size, angle, rng.uniform(0, SIDE, (pieces, 2)) - turned)
    canvas = torch.maximum(canvas, drawn.view(n, FRAGMENTS, SIDE, SIDE).amax(1))
    noise = torch.from_numpy(rng.normal(0, 0.05, (n, SIDE, SIDE)).astype(np.float32))
    return ((canvas + noise).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


@functools.lru_cache
def scenes(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scenes [n,24,24] uint8 and labels [n] int64 of "train" (for pretraining), "probe" or "test"."""
    bases, labels = _bases()
    part = slice(TRAIN_BASES, None) if split == "test" else slice(TRAIN_BASES)
    bases, labels = bases[part], labels[part]
    rng = np.random.Generator(np.random.PCG64(_SEEDS[split]))
    chosen = rng.integers(len(bases), size=COUNTS[split])
    images = np.concatenate(
        [_scenes(bases, chosen[i : i + _CHUNK], rng) for i in range(0, len(chosen), _CHUNK)]
    )
    return images, labels[chosen].astype(np.int64)
