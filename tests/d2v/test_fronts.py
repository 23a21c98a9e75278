"""The three front ends: what they make of a source, and the sources they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from d2v.config.fronts import ImageFront, LogMelFront, WaveformFront
from d2vkern import MaskPlan
from tests.d2v.tiny_models import SAMPLES, make_model, make_source


def test_logmel_front_reads_the_waveform() -> None:
    model, source = make_model("audio"), make_source("audio")
    assert isinstance(model.cfg.front, LogMelFront)
    assert not any("local_encoder" in name for name in model.state_dict())
    louder = model.features(source * 3)
    torch.testing.assert_close(louder.x, model.features(source).x, rtol=0.05, atol=0.05)
    padding = torch.arange(SAMPLES) >= torch.tensor([SAMPLES, 9_000, SAMPLES, 5_000])[:, None]
    assert model(source, padding, ids=torch.arange(4)).loss.isfinite()


def test_waveform_front() -> None:
    front = WaveformFront(
        conv_layers=((8, 10, 5), (8, 3, 2), (8, 2, 2)),
        position_groups=2,
        position_layers=2,
        position_width=14,
    )
    model = make_model("audio", front=front)
    out = model(make_source("audio")[:, :1500], ids=torch.arange(4))
    assert out.targets.shape[1] == front.frames(1500)
    out.loss.backward()
    grad = model.get_parameter("modality_encoders.AUDIO.local_encoder.conv_layers.0.0.weight").grad
    assert grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_rectangular_images(channels: int) -> None:
    front = ImageFront(height=16, width=40, patch=8, channels=channels)
    model = make_model("image", front=front)
    source = torch.randn(2, channels, 16, 40)
    out = model(source, ids=torch.arange(2))
    assert out.targets.shape == (2, 10, 16) and front.grid == (2, 5)
    # patches are row-major: changing the pixels of one changes that row of the local features
    changed = source.clone()
    changed[:, :, 8:16, 16:24] += 1
    local = [model.encoder.local(x, None, torch.float32) for x in (source, changed)]
    differs = (local[0] != local[1]).any(2).any(0)
    assert differs.nonzero().flatten().tolist() == [7]


def test_patches_are_the_convolution() -> None:
    model, source = make_model("image"), make_source("image")
    conv = model.encoder.local_encoder.proj
    torch.testing.assert_close(
        model.encoder.local(source, None, torch.float32), conv(source).flatten(2).transpose(1, 2)
    )


def test_text_positions_start_after_the_padding_id() -> None:
    model = make_model("text").eval()
    embedding = model.encoder.local_encoder
    source = torch.tensor([[5, 6, 1, 1]])
    x = embedding.embed_tokens(source) + embedding.embed_positions(torch.tensor([[2, 3, 1, 1]]))
    torch.testing.assert_close(embedding(source), embedding.layernorm_embedding(x))
    assert (embedding.embed_positions.weight[1] == 0).all()


MASK = torch.zeros(8, 36, dtype=torch.bool)
REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "image size": (
        "image",
        {"source": torch.zeros(2, 1, 24, 20)},
        ValueError,
        r"source must have shape \(B, 1, 24, 24\), got \(2, 1, 24, 20\)",
    ),
    "image without batch": (
        "image",
        {"source": torch.zeros(1, 24, 24)},
        ValueError,
        r"source must have shape \(B, 1, 24, 24\), got \(1, 24, 24\)",
    ),
    "image of bytes": (
        "image",
        {"source": torch.zeros(2, 1, 24, 24, dtype=torch.uint8)},
        TypeError,
        "source must be floating point, got torch.uint8",
    ),
    "mask rows": (
        "image",
        {"source": make_source("image", 3), "mask": MASK},
        ValueError,
        "mask must have a multiple of B = 3 rows, got 8",
    ),
    "mask tokens": (
        "image",
        {"source": make_source("image"), "mask": MASK[:, :30]},
        ValueError,
        "mask must have 36 tokens for this source, got 30",
    ),
    "padded plan": (
        "image",
        {"source": make_source("image"), "mask": MaskPlan.from_mask(MASK, 2, pad=True)},
        ValueError,
        "mask must keep equally many tokens in every row, got a padded plan",
    ),
    "speech shape": (
        "audio",
        {"source": torch.zeros(2, 1, SAMPLES), "mask": MASK},
        ValueError,
        r"source must have shape \(B, samples\), got \(2, 1, 16000\)",
    ),
    "speech too short": (
        "audio",
        {"source": torch.zeros(2, 500), "mask": MASK},
        ValueError,
        r"source must have at least 560 samples \(the receptive field of one token\), got 500",
    ),
    "speech of integers": (
        "audio",
        {"source": torch.zeros(2, SAMPLES, dtype=torch.int16)},
        TypeError,
        "source must be floating point, got torch.int16",
    ),
    "text dtype": (
        "text",
        {"source": torch.zeros(2, 24)},
        TypeError,
        r"source must be \(B, T\) int64 token ids, got \(2, 24\) torch.float32",
    ),
    "text too long": (
        "text",
        {"source": torch.zeros(2, 33, dtype=torch.int64)},
        ValueError,
        "source must have at most 32 tokens, got 33",
    ),
    "padding shape": (
        "text",
        {"source": make_source("text"), "padding_mask": torch.zeros(4, 23, dtype=torch.bool)},
        ValueError,
        r"padding_mask must have shape \(4, 24\) like source, got \(4, 23\)",
    ),
    "padding in front": (
        "text",
        {"source": make_source("text"), "padding_mask": torch.arange(24).expand(4, 24) < 3},
        ValueError,
        "padding_mask must mark the end of each row, got other padding in row 0",
    ),
}


@pytest.mark.parametrize(("modality", "given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(modality: str, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="Data2Vec: " + message):
        make_model(modality)(**given)
