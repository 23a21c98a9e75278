"""Pictures to batches: random resized crop, flip and normalisation, split between worker and device.

Pictures differ in size, batches do not. A worker draws the crop box of a sample (a function of seed, epoch
and sample id), decodes, cuts the box out and shrinks it, with antialiasing, per axis to at most the
training size; a smaller cut stays as it is and is padded to the training size by repeating its edge. So
what leaves a worker is uint8, of one size, and never larger than needed. The device then does the rest
for the whole batch: enlarge the cuts that were small (bicubic), flip, normalise. Cut, antialiased
shrinking and bicubic enlargement together are torchvision's RandomResizedCrop with bicubic interpolation.
What is a picture's content before that (which way up, its colours, transparency) says `eval_picture.upright`.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...config.fronts import ImageFront
from ...config.run import Config, DataConfig
from ..loader import AUGMENT, Source, generator
from ..normalisation import IMAGENET, Normalisation, checked, given
from ..types import Batch, DataError, Unreachable, Unreadable
from .eval_picture import Box, WrongChannels, cut_array, eval_picture, orientation, reason, upright
from .jpeg import JPEG, decoded
from .store import Store, Subset

MEASURED = 1_000
"""pictures read for mean and deviation"""
RATIO = (3 / 4, 4 / 3)
"""width over height of a crop box, as in torchvision"""

BROKEN = (OSError, ValueError, MemoryError)
"""one file's problem; of all that Pillow raises `store.opened` and `eval_picture.upright` make ValueErrors"""

Item = tuple[np.ndarray, int, int, bool]
"""pixels [H,W,C], of which the first (h, w) are content, h, w, and whether to flip"""


def crop_box(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> Box:
    """A box with a share of the area in `scale` and an aspect ratio in `RATIO` (log-uniform).

    Ten tries, then the largest centred box within the ratio limits. Source: torchvision,
    RandomResizedCrop.get_params.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class ImageSource(Source):
    """A store of pictures as training samples of one size."""

    def __init__(self, path: str, store: Store, cfg: Config) -> None:
        super().__init__(path, cfg.train.seed, cfg.data.batch, cfg.data.shuffle_window)
        assert isinstance(cfg.model.front, ImageFront)
        self.store = store
        self.front = cfg.model.front
        self.scale, self.flip = cfg.data.crop_scale, cfg.data.flip
        self.max_pixels = cfg.data.max_pixels

    def prepare(self, cfg: DataConfig) -> ImageSource:
        """Refuse a wrong channel count before anything runs, and settle how pictures are normalised."""
        for index in range(min(len(self), 10)):
            try:
                self.read(index, None)
                break
            except Unreadable:
                continue
        self.normalisation = self._settle(cfg)
        self.meta = {"mean": list(self.normalisation.mean), "std": list(self.normalisation.std)}
        return self

    def select(self, keep: np.ndarray) -> ImageSource:
        """The pictures numbered `keep` [k] int64, normalised as all of them are."""
        chosen = copy.copy(self)
        chosen.store = Subset(self.store, keep)
        return chosen

    def __len__(self) -> int:
        return len(self.store)

    def name(self, index: int) -> str:
        return self.store.name(index)

    def read(self, index: int, epoch: int | None) -> Item:
        item, _, done = self._read(index, epoch)
        for what in done:
            self.heard.setdefault(f"pictures {what}", self.name(index))
        return item

    def look(self, index: int) -> tuple[str, list[str]]:
        """Width x height as stored, and what is done to the picture, in words. Raises as `read`."""
        _, size, done = self._read(index, None)
        return size, done

    def _read(self, index: int, epoch: int | None) -> tuple[Item, str, list[str]]:
        done: list[str] = []
        try:
            picture = self._load(index)
            width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
            return self._cut(picture, index, epoch, done), f"{width}x{height}", done
        except WrongChannels as error:
            raise DataError(
                f"data: {self.name(index)} has {error.got} channels, front.channels is {error.wanted}"
            ) from None
        except Unreachable:
            raise
        except BROKEN as error:
            raise Unreadable(reason(error)) from None

    def _load(self, index: int) -> Image.Image | np.ndarray:
        """As `Store.load`, not yet decoded. ValueError where that would be too large, by its header."""
        picture = self.store.load(index)
        if isinstance(picture, Image.Image) and math.prod(picture.size) > self.max_pixels:
            width, height = picture.size
            raise ValueError(
                f"{width:,} x {height:,} pixels are more than data.max_pixels, {self.max_pixels:,}"
            )
        return picture

    def _cut(self, picture: Image.Image | np.ndarray, index: int, epoch: int | None, done: list[str]) -> Item:
        """done: what was done to the picture, as in `eval_picture.upright`."""
        front = self.front
        if epoch is None:
            whole = eval_picture(picture, front.height, front.width, front.channels, done)
            return whole, front.height, front.width, False
        if isinstance(picture, np.ndarray):
            height, width = picture.shape[:2]
        elif picture.format in JPEG:
            turn = orientation(picture)
            height, width = picture.size[::-1] if turn < 5 else picture.size
        else:
            picture = upright(picture, front.channels, done)
            height, width = picture.size[::-1]
        rng = generator(self.seed, AUGMENT, epoch, index)
        box = crop_box(rng, height, width, self.scale)
        flip = self.flip and bool(rng.integers(2))
        h, w = min(box[3] - box[1], front.height), min(box[2] - box[0], front.width)
        if isinstance(picture, np.ndarray):
            return *self._padded(cut_array(picture, box, h, w, front.channels, done)), flip
        scale, pixels = 1.0, None
        if picture.format in JPEG:
            # decoded at 1/2, 1/4 or 1/8 for a fraction of the work where that is still large enough
            enough = -(-width * w // (box[2] - box[0])), -(-height * h // (box[3] - box[1]))
            stored = picture.size
            drafted = picture.draft(None, enough if turn < 5 else enough[::-1])
            scale = 1.0 if drafted is None else drafted[1][2] / stored[0]
            pixels = decoded(picture) if turn == 1 and front.channels == 3 else None
            picture = picture if pixels is not None else upright(picture, front.channels, done)
        left, top, right, bottom = (int(side * scale + 0.5) for side in box)
        if pixels is None:
            cut: Image.Image | np.ndarray = picture.crop((left, top, right, bottom))
        else:
            cut = pixels[top:bottom, left:right]
        return *self._padded(shrunk(cut, h, w)), flip

    def _padded(self, pixels: np.ndarray) -> tuple[np.ndarray, int, int]:
        """A cut [h,w,C] at the training size, its edge repeated; h and w."""
        front, (h, w) = self.front, pixels.shape[:2]
        if (h, w) == (front.height, front.width):
            return pixels, h, w
        canvas = np.empty((front.height, front.width, front.channels), dtype=pixels.dtype)
        canvas[:h, :w] = pixels
        canvas[:h, w:] = pixels[:, -1:]
        canvas[h:] = canvas[h - 1]
        return canvas, h, w

    def collate(self, items: list[Item], ids: np.ndarray, epoch: int | None) -> Batch:
        """source [B,C,H,W] as stored (uint8 or float); extra: content size [B,2] (h, w) and flip [B]."""
        pixels = torch.from_numpy(np.stack([item[0] for item in items])).permute(0, 3, 1, 2).contiguous()
        if epoch is None:
            return Batch(pixels, torch.from_numpy(ids), 0)
        extra = {
            "size": torch.tensor([item[1:3] for item in items], dtype=torch.float32),
            "flip": torch.tensor([item[3] for item in items]),
        }
        return Batch(pixels, torch.from_numpy(ids), epoch, extra=extra)

    def finish(self, batch: Batch) -> Batch:
        """Enlarge, flip and normalise on the device: source [B,C,H,W] float32."""
        return Batch(self.normalise(self.pixels(batch)), batch.ids, batch.epoch)

    def normalise(self, source: Tensor) -> Tensor:
        """(source - mean) / std per channel."""
        from kornia.enhance import normalize

        value = self.normalisation
        assert value is not None  # of `prepare`
        mean, std = (_on_device(v, source.device) for v in (value.mean, value.std))
        return normalize(source, mean, std)

    def pixels(self, batch: Batch) -> Tensor:
        """[B,C,H,W] float32, enlarged and flipped, bytes as 0..1."""
        is_bytes = batch.source.dtype == torch.uint8
        source = batch.source.float() / 255 if is_bytes else batch.source
        if batch.extra:
            source = enlarge_and_flip(source, batch.extra["size"], batch.extra["flip"])
            source = source.clamp(0, 1) if is_bytes else source  # bicubic overshoots
        return source

    def _settle(self, cfg: DataConfig) -> Normalisation:
        """Given, ImageNet's, or measured here; the deviation of a constant channel is 1."""
        channels = self.front.channels
        if (value := given(cfg, channels)) is not None:
            return value
        if channels == 3 and not self.store.floating:
            return IMAGENET
        sums, squares, count = np.zeros(channels), np.zeros(channels), 0
        for index in np.linspace(0, len(self) - 1, min(len(self), MEASURED)).round().astype(int).tolist():
            try:
                pixels = self.read(index, None)[0].astype(np.float64)
            except Unreadable:
                continue
            pixels = pixels if self.store.floating else pixels / 255
            sums += pixels.sum((0, 1))
            squares += (pixels**2).sum((0, 1))
            count += pixels.shape[0] * pixels.shape[1]
        if not count:
            raise DataError(f"data: {self.path}: none of {min(len(self), MEASURED)} pictures can be read")
        mean = sums / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        std = np.where(std > 1e-6, std, 1.0)
        return checked(mean.tolist(), std.tolist(), "measured", channels, f"data: {self.path}: measured ")


def shrunk(cut: Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    """A cut, or pixels [h,w,C] uint8, at a size, bicubic with antialiasing: [height,width,C] uint8.

    For L and RGB by torch's integer kernel: within 2 of 255 of Pillow's resize of the cut, which the original
    uses, in a third of its time. Pillow does RGBA, where colours count by their alpha.
    """
    if isinstance(cut, Image.Image):
        if cut.mode == "RGBA":
            return np.asarray(cut.resize((width, height), Image.Resampling.BICUBIC))
        pixels = np.array(cut).reshape(cut.height, cut.width, -1)
    else:
        pixels = cut
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(planes, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def enlarge_and_flip(source: Tensor, size: Tensor, flip: Tensor) -> Tensor:
    """Stretch the first (h, w) = size [B,2] pixels of each picture [B,C,H,W] over all of it, bicubic, and
    mirror it where flip [B]: one resampling with `kornia.geometry.transform.remap`.

    Equal to interpolating the cut alone, as the padding repeats its edge.
    """
    from kornia.geometry.transform import remap

    batch, _, height, width = source.shape
    rows = torch.arange(height, device=source.device) + 0.5
    columns = (torch.arange(width, device=source.device) + 0.5).expand(batch, -1)
    columns = torch.where(flip[:, None], width - columns, columns)
    y = rows * size[:, :1] / height - 0.5
    x = columns * size[:, 1:] / width - 0.5
    # in -1..1 between the outermost pixels: given pixels, kornia would copy their scale from the host
    y = y * (2 / max(1, height - 1)) - int(height > 1)
    x = x * (2 / max(1, width - 1)) - int(width > 1)
    shape = (batch, height, width)
    return remap(
        source,
        x[:, None, :].expand(shape),
        y[:, :, None].expand(shape),
        mode="bicubic",
        padding_mode="border",
        align_corners=True,
        normalized_coordinates=True,
    )


def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[n] float32, filled in on the device: a copy from the host would wait for it."""
    return torch.stack([torch.full((), value, device=device) for value in values])
