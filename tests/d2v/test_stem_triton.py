"""The speech encoder on Triton's conv_stem beside eager, and the original's recorded numbers through it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import d2vkern
from d2v.config.fronts import WaveformFront
from d2v.model.feature_encoder import WaveformEncoder
from d2vkern.testing import assert_no_worse_than_eager, backend_spy
from tests.d2v.golden_cases import load
from tests.d2v.tiny_models import make_model

WIDTH = 24
LAYERS = ((WIDTH, 10, 5), *(((WIDTH, 3, 2),) * 4), *(((WIDTH, 2, 2),) * 2))
SAMPLES = 1_011


def outputs_and_gradients(
    encoder: WaveformEncoder, source: Tensor, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """The encoder's output and the gradients of all parameters."""
    encoder.zero_grad()
    encoder = encoder.to(torch.float64 if dtype == torch.float64 else torch.float32)
    with d2vkern.use_backend("eager", conv_stem=backend):
        out = encoder(source.to(dtype))
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    out.backward(weights.to(out.device, dtype))
    return [out.detach().clone(), *(p.grad.clone() for p in encoder.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_seven_layers(dtype: torch.dtype, triton_device: torch.device) -> None:
    encoder = WaveformEncoder(WaveformFront(conv_layers=LAYERS)).to(triton_device)
    source = torch.randn(2, SAMPLES).to(triton_device)
    with backend_spy() as calls:
        ours = outputs_and_gradients(encoder, source, "triton", dtype)
    assert calls == [("conv_stem", "triton")] * 7
    eager = outputs_and_gradients(encoder, source, "eager", dtype)
    exact = outputs_and_gradients(encoder, source, "eager", torch.float64)
    assert ours[0].shape == (2, WaveformFront(conv_layers=LAYERS).frames(SAMPLES), WIDTH)
    for actual, same_dtype, reference in zip(ours, eager, exact, strict=True):
        # a layer's allowance is 2; seven in a row spread what two equally good roundings differ by
        assert_no_worse_than_eager(actual, same_dtype, reference, factor=3)


def test_a_model_with_padding(triton_device: torch.device) -> None:
    front = WaveformFront(conv_layers=LAYERS, position_groups=2, position_layers=2, position_width=14)
    model = make_model("audio", front=front).to(triton_device)
    source = torch.randn(2, 2 * SAMPLES).to(triton_device)
    lengths = torch.tensor([2 * SAMPLES, 1_500])[:, None]
    padding = (torch.arange(2 * SAMPLES) >= lengths).to(triton_device)
    source = source.masked_fill(padding, 0.0)
    found = []
    for backend in ("triton", "eager"):
        model.zero_grad()
        torch.manual_seed(1)  # the decoder's noise
        with d2vkern.use_backend("eager", conv_stem=backend), backend_spy() as calls:
            out = model(source, padding, ids=torch.arange(2))
            out.loss.backward()
        assert calls.count(("conv_stem", backend)) == 7
        features = model.features(source, padding)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.loss.detach(), features.padding_mask, gradients))
    (loss, mask, gradients), (expected, same_mask, theirs) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(mask, same_mask) and mask.any()
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        error = (gradient - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12)
        assert error < 1e-4 or gradient.norm() < 1e-8, f"{name} differs by {error:.1e}"


@pytest.mark.slow
def test_the_originals_numbers(goldens: Path, triton_device: torch.device) -> None:
    """Loss and the stem's gradients of the golden padded case; the rest of the model runs on eager."""
    case = load(goldens, "audio_padded")
    model = case.model().to(triton_device)
    inputs = {key: None if x is None else x.to(triton_device) for key, x in case.inputs().items()}
    with d2vkern.use_backend("eager", conv_stem="triton"), backend_spy() as calls:
        out = model(**inputs)
        out.loss.backward()
    assert calls.count(("conv_stem", "triton")) == len(model.cfg.front.conv_layers)
    assert out.loss.item() == pytest.approx(case.facts["scalars"]["total_loss"], rel=1e-5)
    stem = [key for key, _ in model.named_parameters() if ".local_encoder." in key]
    assert len(stem) == 3 * len(model.cfg.front.conv_layers)
    named = dict(model.named_parameters())
    for key in stem:
        expected = case.tensors[f"grad.{key}"].to(triton_device)
        assert (named[key].grad - expected).norm() <= 1e-5 * expected.norm(), key
