"""Picture files and what is read of them, for tests."""

from __future__ import annotations

import dataclasses
import io
import itertools
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from d2v.config.fronts import ImageFront
from d2v.config.presets import preset
from d2v.config.run import Config, DataConfig
from d2v.data.images.parts import open_stores
from d2v.data.images.source import ImageSource
from d2v.data.types import Batch, Pipeline, Position, Report

START = Position()


def config(height: int = 16, width: int = 16, channels: int = 3, **data) -> Config:
    cfg = preset("image_tiny")
    front = ImageFront(height=height, width=width, patch=4, channels=channels)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, front=front),
        data=DataConfig(**{"batch": 4, "flip": True, "crop_scale": (0.2, 1.0), **data}),
    )


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def tiff(data: bytes, width: int, height: int, **tags: int) -> bytes:
    """A little-endian TIFF of one strip, grey by default. tags: by their names in the specification."""
    numbers = {
        "bits_per_sample": 258, "compression": 259, "photometric": 262, "samples_per_pixel": 277,
        "max_sample_value": 281,
    }  # fmt: skip
    given = {256: width, 257: height, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = sorted((given | {numbers[name]: value for name, value in tags.items()}).items())
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(entries)) + directory + bytes(4)


def source_of(path: Path, **settings) -> ImageSource:
    """The pictures at a path, read by `config(**settings)`."""
    cfg = config(**settings)
    return ImageSource(str(path), open_stores(path, Report(str(path), 0), divided=False)["all"], cfg)


def first(pipeline: Pipeline, steps: int = 1, micro: int = 4, start: Position = START) -> list[Batch]:
    stream = pipeline.micro_batches(start, micro)
    return [b for step in itertools.islice(stream, steps) for b in step]


def unnormalised(source: torch.Tensor, meta: dict) -> torch.Tensor:
    mean, std = (torch.tensor(meta[k])[:, None, None] for k in ("mean", "std"))
    return source * std + mean
