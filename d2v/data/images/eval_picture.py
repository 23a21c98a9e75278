"""The picture that a model sees where nothing is augmented: its colours, its centre, its size.

Evaluation, probes and extraction read pictures by it. A folder for transformers holds a copy of this file,
for its image processor to do the same; so it needs NumPy, Pillow and torch alone.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

EVAL_RESIZE = 256 / 224
"""size of the resized picture over the size of the centre crop"""

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels"""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class WrongChannels(ValueError):
    """A picture whose colours do not fit a model's channels."""

    def __init__(self, got: int, wanted: int) -> None:
        super().__init__(f"the picture has {got} channels, the model reads {wanted}")
        self.got, self.wanted = got, wanted


def eval_box(height: int, width: int, out_height: int, out_width: int) -> Box:
    """The box whose content becomes the picture when it is not augmented.

    Resizing the shorter side to 256/224 of the output and cutting the centre, in one; a picture that
    already has the output's size is taken whole.
    """
    if (height, width) == (out_height, out_width):
        return 0, 0, width, height
    pixel = min(height / out_height, width / out_width) / EVAL_RESIZE
    h, w = max(1, round(out_height * pixel)), max(1, round(out_width * pixel))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def as_mode(image: Image.Image, channels: int) -> Image.Image:
    """Grey, palette and CMYK become RGB and alpha is dropped, as in the original.

    Raises WrongChannels where colour would be lost or made up, and ValueError for 32-bit pixels.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (Pillow mode {image.mode}); use .npz for them")
    bands = 3 if image.mode == "P" else len(image.getbands())
    grey = image.mode in ("1", "L", "LA", "La")
    fits = {1: grey, 3: True, 4: image.mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info}
    if not fits.get(channels, False):
        raise WrongChannels(bands, channels)
    return image.convert(_MODES[channels])


def cut_array(pixels: np.ndarray, box: Box, height: int, width: int, channels: int) -> np.ndarray:
    """The box of an array [h,w,C] at a size, antialiased bicubic: [height,width,C], uint8 or float32."""
    if pixels.shape[2] != channels:
        raise WrongChannels(pixels.shape[2], channels)
    left, top, right, bottom = box
    pixels = pixels[top:bottom, left:right]
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    if pixels.dtype == np.uint8:
        planes = planes.round().clamp(0, 255).to(torch.uint8)
    return planes.numpy()


def eval_picture(picture: Image.Image | np.ndarray, height: int, width: int, channels: int) -> np.ndarray:
    """Pixels [height,width,C], uint8, or float32 of a float array.

    picture: a Pillow image, or an array [h,w,C], uint8 or float32. EXIF rotation is not applied. JPEGs are
    decoded at their full size, so that it does not matter whether that was done before. Raises as `as_mode`.
    """
    h, w = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
    box = eval_box(h, w, height, width)
    if isinstance(picture, np.ndarray):
        return cut_array(picture, box, height, width, channels)
    cut = as_mode(picture, channels).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(cut).reshape(height, width, channels)
