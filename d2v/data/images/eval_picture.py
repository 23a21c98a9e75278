"""The picture that a model sees where nothing is augmented: which way up, its colours, its centre, its size.

Evaluation, probes and extraction read pictures by it, and training takes its crops from what `upright` gives.
A folder for transformers holds a copy of this file, for its image processor to do the same; so it needs
NumPy, Pillow and torch alone.
"""

from __future__ import annotations

import io
import re
import sys
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops

EVAL_RESIZE = 256 / 224
"""size of the resized picture over the size of the centre crop"""

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels"""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
WHITE = 255
"""what shows through transparent pixels"""
LUMA = np.array([19_595, 38_470, 7_471])
"""parts of 65,536 of red, green and blue that make grey: ITU-R 601, as Pillow computes it"""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _MAX_SAMPLE = 258, 262, 274, 281
"""tags of TIFF and EXIF"""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what puts the picture upright"""
_GREY = ("1", "L", "LA", "La")
_DEEP_COLOURS = re.compile(r"RGB[AX]?;16[BLN]$")

TURNED = "turned upright by their EXIF orientation"
SHALLOW = "of 16 bits, of which fewer are used: these are scaled to all of black to white"
CLEAR = "with transparency, put on white"
OPAQUE = "without transparency, made opaque (--model.front.channels 3 is enough where all are)"
COLOURED = "in colour, made grey (--model.front.channels 3 keeps their colours)"
GREY = "grey, made three equal channels (--model.front.channels 1 is enough where all are)"
"""what is done to pictures, as a user is told"""


class WrongChannels(ValueError):
    """A picture that has another number of channels than a model reads, and is not to be converted."""

    def __init__(self, got: int, wanted: int) -> None:
        super().__init__(f"the picture has {got} channels, the model reads {wanted}")
        self.got, self.wanted = got, wanted


class Damaged(ValueError):
    """A picture that does not decode."""


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


def orientation(picture: Image.Image) -> int:
    """1 to 8 as EXIF counts them; 1, upright, where the picture says nothing that can be read."""
    try:
        value = picture.getexif().get(_ORIENTATION)
    except Exception:  # whatever a damaged block of metadata makes Pillow raise: the pixels may be whole
        return 1
    return value if value in _TURNS else 1


def upright(picture: Image.Image, channels: int, done: list[str] | None = None) -> Image.Image:
    """A Pillow image as it is meant to be seen, in mode L, RGB or RGBA for 1, 3 or 4 channels.

    It is turned as its EXIF orientation says. Transparent pixels are put on white, except for 4 channels.
    Colour becomes grey, grey becomes three equal channels. What has 16 bits is scaled by the bits that are
    used: TIFF's BitsPerSample or MaxSampleValue, PNG's sBIT, else 12 where no pixel is above 4,095, as
    cameras and scanners of 12 bits write them, else 16. Of an animation the first frame is taken.

    done: what was done of this is added to it, in the words above. Raises WrongChannels, Damaged where the
    picture does not decode, ValueError for 32-bit pixels.
    """
    done = [] if done is None else done
    if channels not in _MODES:
        raise WrongChannels(len(picture.getbands()), channels)
    try:
        deep = _deep_colours(picture)
        bits = _stated_bits(picture) if deep is not None or _is_deep(picture) else None
        picture.load()
        low = _lower_bytes(picture, bits, deep)
    except Exception as error:  # plugins raise nearly everything on damaged files, also without a message
        raise Damaged(reason(error)) from error
    image = picture
    if _is_deep(picture):
        image = _of_8_bits(picture, bits, done)
    elif low is not None:
        image = _colours_of_8_bits(picture, low, bits, done)
    elif picture.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (Pillow mode {picture.mode}); use .npz for them")
    grey, clear = image.mode in _GREY, image.has_transparency_data
    if channels == 1 and not grey:
        done.append(COLOURED)
    elif channels == 3 and grey:
        done.append(GREY)
    elif channels == 4 and not clear:
        done.append(OPAQUE)
    if clear and channels < 4:
        done.append(CLEAR)
        image = _on_white(image)
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    turn = _TURNS.get(orientation(picture))
    if turn is not None:
        done.append(TURNED)
        image = image.transpose(turn)
    return image


def reason(error: BaseException) -> str:
    """What a user is told of a file that cannot be read: the kind of error too, where its words need it."""
    if isinstance(error, OSError) and error.strerror:  # without the path, which the user is told as well
        return error.strerror
    said = str(error)
    if said and isinstance(error, (OSError, SyntaxError, ValueError, EOFError)):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _is_deep(picture: Image.Image) -> bool:
    """Whether it is grey of 16 bits; older versions of Pillow open such PNGs with 32."""
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")


def _stated_bits(picture: Image.Image) -> int | None:
    """Bits that are used, by the header of a file that is not decoded yet; None where it does not say."""
    tags = getattr(picture, "tag_v2", None)
    if tags is not None:
        bits, largest = (tags.get(tag) for tag in (_BITS_PER_SAMPLE, _MAX_SAMPLE))
        bits, largest = (v[0] if isinstance(v, tuple) and v else v for v in (bits, largest))
        stated = (bits, largest.bit_length() if isinstance(largest, int) else None)
        return min((n for n in stated if isinstance(n, int) and n < 16), default=None)
    file = getattr(picture, "fp", None)
    return _significant_bits(file) if picture.format == "PNG" and file is not None else None


def _significant_bits(file: IO[bytes]) -> int | None:
    """Of grey, by the sBIT chunk of a PNG; where it is read from stays as it is."""
    place = file.tell()
    try:
        file.seek(8)
        while True:
            head = file.read(8)
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"sBIT":
                return int.from_bytes(file.read(1), "big")
            if len(head) < 8 or kind == b"IDAT":
                return None
            file.seek(length + 4, 1)
    finally:
        file.seek(place)


def _used_bits(values: np.ndarray, stated: int | None) -> int:
    """8 to 16, of values of 16 bits."""
    top = int(values.max(initial=0))
    bits = 12 if stated is None and top < 1 << 12 else stated
    return 16 if bits is None or not 8 <= bits < 16 or top >= 1 << bits else bits


def _deep_colours(picture: Image.Image) -> bytes | None:
    """The file of a picture with colours of 16 bits, before Pillow decodes it and drops the lower 8."""
    tiles, file = getattr(picture, "tile", None), getattr(picture, "fp", None)
    if not tiles or file is None or not _DEEP_COLOURS.match(_raw_mode(tiles[0][3])):
        return None
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return data


def _raw_mode(arguments: object) -> str:
    """How a decoder of Pillow is told that pixels lie in a file."""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _lower_bytes(picture: Image.Image, bits: int | None, data: bytes | None) -> np.ndarray | None:
    """[h,w,C] of `data`, by decoding it with its bytes swapped, where the upper ones do not say enough."""
    if data is None or (bits is None and np.asarray(picture)[..., :3].max(initial=0) >= 1 << 4):
        return None
    again = Image.open(io.BytesIO(data))
    for i, (codec, extents, offset, arguments) in enumerate(again.tile):
        raw = _raw_mode(arguments)
        swapped = raw[:-1] + ("L" if raw[-1] == "B" or raw[-1] == "N" and sys.byteorder == "big" else "B")
        rest = (swapped, *arguments[1:]) if isinstance(arguments, tuple) else swapped
        again.tile[i] = type(again.tile[i])(codec, extents, offset, rest)
    return np.asarray(again)


def _colours_of_8_bits(
    picture: Image.Image, low: np.ndarray, bits: int | None, done: list[str]
) -> Image.Image:
    """A picture of the upper bytes of 16 bits with the bits that are used; alpha by those that it uses."""
    values = np.asarray(picture).astype(np.uint16) << 8 | low
    used = _used_bits(values[..., :3], bits)
    if used == 16:
        return picture
    done.append(SHALLOW)
    shifts = [used - 8] * 3 + [_used_bits(values[..., 3:], bits) - 8] * (values.shape[2] - 3)
    image = Image.fromarray((values >> np.array(shifts, np.uint16)).astype(np.uint8))
    if isinstance(key := picture.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(value >> used - 8 for value in key)
    return image


def _of_8_bits(picture: Image.Image, bits: int | None, done: list[str]) -> Image.Image:
    """Grey of 16 bits as mode L, or LA where a value of it is transparent."""
    values = np.asarray(picture)
    bits = _used_bits(values, bits)
    if bits < 16:
        done.append(SHALLOW)
    pixels = (values >> (bits - 8)).astype(np.uint8)
    if getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # WhiteIsZero, which Pillow heeds up to 8 bits
        pixels = WHITE - pixels
    grey = Image.fromarray(pixels)
    clear = picture.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def _on_white(image: Image.Image) -> Image.Image:
    """Mode L or RGB, where transparent pixels are white."""
    key = image.info.get("transparency")
    if (
        isinstance(key, tuple) and max(key) > 255
    ):  # of 16 bits a channel, of which Pillow keeps the upper half
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if image.mode in ("1", "L", "La") else "RGBA")
    solid = image.convert("L" if image.mode == "LA" else "RGB")
    solid.paste(WHITE if solid.mode == "L" else (WHITE,) * 3, mask=ImageChops.invert(image.getchannel("A")))
    return solid


def cut_array(
    pixels: np.ndarray, box: Box, height: int, width: int, channels: int, done: list[str] | None = None
) -> np.ndarray:
    """The box of an array [h,w,C] at a size, antialiased bicubic: [height,width,channels], uint8 or float32.

    One channel becomes three equal ones, three become grey. Raises WrongChannels for other numbers,
    ValueError for NaN or inf anywhere in the array. done: as in `upright`.
    """
    given = pixels.shape[2]
    if given != channels and {given, channels} != {1, 3}:
        raise WrongChannels(given, channels)
    _check_finite(pixels)
    left, top, right, bottom = box
    pixels = pixels[top:bottom, left:right]
    if given != channels:
        pixels = pixels.repeat(3, axis=2) if given == 1 else _grey(pixels)
        if done is not None:
            done.append(GREY if given == 1 else COLOURED)
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    if pixels.dtype == np.uint8:
        planes = planes.round().clamp(0, 255).to(torch.uint8)
    _check_finite(planes.numpy())  # bicubic overshoots, here beyond the largest number
    return planes.numpy()


def _check_finite(pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8 and not np.isfinite(pixels).all():
        raise ValueError("NaN or inf among the pixels")


def _grey(pixels: np.ndarray) -> np.ndarray:
    """[h,w,1] of [h,w,3], in its type: of bytes what Pillow makes of them."""
    if pixels.dtype == np.uint8:
        return ((pixels @ LUMA + (1 << 15)) >> 16).astype(np.uint8)[..., None]
    return (pixels @ (LUMA / (1 << 16)).astype(pixels.dtype))[..., None]


def eval_picture(
    picture: Image.Image | np.ndarray, height: int, width: int, channels: int, done: list[str] | None = None
) -> np.ndarray:
    """Pixels [height,width,C], uint8, or float32 of a float array.

    picture: a Pillow image, or an array [h,w,C], uint8 or float32. JPEGs are decoded at their full size, so
    that it does not matter whether that was done before. done: as in `upright`. Raises as `upright` and
    `cut_array`.
    """
    if isinstance(picture, np.ndarray):
        box = eval_box(picture.shape[0], picture.shape[1], height, width)
        return cut_array(picture, box, height, width, channels, done)
    image = upright(picture, channels, done)
    box = eval_box(image.height, image.width, height, width)
    cut = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(cut).reshape(height, width, channels)
