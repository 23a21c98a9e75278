"""Pictures for data2vec 2.0 encoders in Hugging Face transformers, exactly as `d2v eval` reads them.

The shorter side becomes 256/224 of the model's, bicubic with antialiasing, and the centre is cut out, both in
one resampling; a picture that has the model's size already is taken whole. Before that it is turned upright
by its EXIF orientation, put on white where it is transparent, and made RGB, or grey for one channel.
"""

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from ...data.images.eval_picture import eval_picture


class Data2Vec2ImageProcessor(BaseImageProcessor):
    """size: height and width in pixels. image_mean, image_std: of each channel, of bytes as 0..1."""

    model_input_names = ["pixel_values"]

    def __init__(
        self, size=None, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225), **kwargs
    ):
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 224, "width": 224})
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def to_dict(self):
        """Without the class's name, which auto_map says: transformers 4 warns of a slow class."""
        return {name: value for name, value in super().to_dict().items() if name != "image_processor_type"}

    def preprocess(self, images, input_data_format=None, return_tensors=None):
        """pixel_values [B,C,H,W] float32.

        images: one or several Pillow images, arrays or tensors [h,w], [h,w,C] or [C,h,w], uint8 or float;
        floats are not rescaled. input_data_format: "channels_first" or "channels_last", where the shape does
        not tell. Raises ValueError for a picture with another number of channels that is not to be converted,
        and for one with NaN or inf.
        """
        several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        values = [self._values(image, input_data_format) for image in (images if several else [images])]
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def _values(self, image, layout):
        channels = len(self.image_mean)
        picture = image if isinstance(image, Image.Image) else channels_last(image, channels, layout)
        pixels = eval_picture(picture, self.size["height"], self.size["width"], channels)
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()
        if pixels.dtype == np.uint8:
            x = x / 255
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (self.image_mean, self.image_std))
        return ((x - mean) / std).numpy()


def channels_last(image, channels, layout):
    """[h,w,C] uint8 or float32. Where both ends fit the channels, an array has them last, a tensor first."""
    first = isinstance(image, torch.Tensor)
    pixels = image.detach().cpu().numpy() if first else np.asarray(image)
    if pixels.dtype != np.uint8:
        if not np.issubdtype(pixels.dtype, np.floating):
            raise ValueError(f"images must be uint8 or float, got {pixels.dtype}")
        pixels = pixels.astype(np.float32)
    if pixels.ndim == 2:
        return pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"images must be [h,w], [h,w,C] or [C,h,w], got shape {pixels.shape}")
    if layout is None:
        ends = pixels.shape[0], pixels.shape[2]
        known = (1, 3) if channels in (1, 3) and channels not in ends else (channels,)
        fits = [end in known for end in ends]
        layout = "channels_first" if fits[0] and (first or not fits[1]) else "channels_last"
    return pixels.transpose(1, 2, 0) if str(getattr(layout, "value", layout)) == "channels_first" else pixels
