"""JPEGs by simplejpeg, where it is installed: Pillow's bits, as both use libjpeg-turbo, a quarter faster.

All that is not plain is left to Pillow, which also says what is wrong with a file.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

JPEG = ("JPEG", "MPO")
"""what Pillow calls such files, those of several pictures too"""


def decoded(picture: Image.Image) -> np.ndarray | None:
    """[h,w,3] uint8 of an image of `store.opened`, at the size that `draft` set; None: Pillow must do it."""
    file = getattr(picture, "fp", None)
    if simplejpeg is None or picture.mode != "RGB" or not isinstance(file, io.BytesIO):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(
            file.getvalue(), "RGB", min_height=picture.height, min_width=picture.width
        )
    except ValueError:  # also for what libjpeg-turbo warns of
        return None
    return pixels if pixels.shape[:2] == (picture.height, picture.width) else None
