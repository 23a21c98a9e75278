"""`log_mel` against the same features written out with numpy and scipy, and its handling of lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import get_window

from d2v.config.fronts import LogMelFront
from d2v.model.logmel import LOG_FLOOR, log_mel, mel_filters

FRONTS = {
    "tiny": LogMelFront(),
    "odd": LogMelFront(sample_rate=8000, mels=7, window=201, hop=67, stack=3),
    "single": LogMelFront(mels=5, window=64, hop=64, stack=1),
}


def by_hand(wave: np.ndarray, front: LogMelFront, normalise: bool) -> np.ndarray:
    """One utterance, one spectrum and one filter at a time, in float64. Returns [T, width]."""
    n_fft = 1
    while n_fft < front.window:
        n_fft *= 2
    to_hz = lambda mel: 700 * (10 ** (mel / 2595) - 1)  # noqa: E731
    top = 2595 * np.log10(1 + front.sample_rate / 2 / 700)
    edges = [to_hz(top * i / (front.mels + 1)) for i in range(front.mels + 2)]
    frequencies = np.fft.rfftfreq(n_fft, 1 / front.sample_rate)
    filters = np.stack([np.interp(frequencies, edges[i : i + 3], [0, 1, 0]) for i in range(front.mels)])
    window = get_window("hann", front.window)
    rows = []
    for start in range(0, len(wave) - front.window + 1, front.hop):
        spectrum = np.fft.fft(wave[start : start + front.window] * window, n_fft)[: n_fft // 2 + 1]
        rows.append(np.log(filters @ np.abs(spectrum) ** 2 + LOG_FLOOR))
    tokens = len(rows) // front.stack
    mel = np.array(rows[: tokens * front.stack])
    if normalise:
        mel = (mel - mel.mean(0)) / np.sqrt(mel.var(0) + 1e-5)
    return mel.reshape(tokens, front.width)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("front", FRONTS.values(), ids=FRONTS)
def test_equals_the_features_by_hand(front: LogMelFront, normalise: bool) -> None:
    wave = noise(2, 4321)
    out = log_mel(wave, front, normalise=normalise)
    assert out.shape == (2, front.frames(4321), front.width) and out.dtype == torch.float32
    for row, expected in zip(out.numpy(), wave.double().numpy(), strict=True):
        np.testing.assert_allclose(row, by_hand(expected, front, normalise), atol=2e-4)


@pytest.mark.parametrize("samples", [0, 399, 400, 559, 560, 879, 880, 16_000, 16_001])
def test_token_count_is_the_front_ends(samples: int) -> None:
    front = LogMelFront()
    assert log_mel(noise(3, samples), front).shape == (3, front.frames(samples), 80)


def test_padding_changes_nothing_and_stays_zero() -> None:
    front = LogMelFront()
    lengths = torch.tensor([3000, 8000, 300, 5555])
    wave = noise(4, 8000) * 0.1
    out = log_mel(wave, front, lengths)  # the padding holds noise on purpose
    for row, length in zip(range(4), lengths.tolist(), strict=True):
        alone = log_mel(wave[row : row + 1, :length], front)[0]
        torch.testing.assert_close(out[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)
        assert out[row, len(alone) :].eq(0).all()
    assert front.frames(300) == 0 and front.frames(5555) > 0


def test_statistics_are_per_band_over_time() -> None:
    front = LogMelFront()
    out = log_mel(noise(1, 32_000), front)[0].reshape(-1, front.mels)
    torch.testing.assert_close(out.mean(0), torch.zeros(40), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, unbiased=False), torch.ones(40), atol=1e-3, rtol=0)


def test_silence_is_finite_and_near_zero() -> None:
    assert log_mel(torch.zeros(1, 4000), LogMelFront()).abs().max() < 1e-3


def test_a_tone_is_loudest_in_its_own_band() -> None:
    front = LogMelFront()
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 16_000)
    mel = log_mel(tone[None], front, normalise=False)[0].reshape(-1, front.mels).mean(0)
    centres = mel_filters(front, 257).argmax(0) * 16_000 / 512
    assert abs(centres[mel.argmax()].item() - 1000) < 60


def test_low_precision_input_is_computed_in_float32() -> None:
    wave = noise(1, 4000).bfloat16()
    assert torch.equal(log_mel(wave, LogMelFront()), log_mel(wave.float(), LogMelFront()))


def test_compiles_without_graph_breaks() -> None:
    compiled = torch.compile(log_mel, fullgraph=True, backend="eager")
    wave, lengths = noise(2, 4000), torch.tensor([4000, 2000])
    torch.testing.assert_close(compiled(wave, LogMelFront(), lengths), log_mel(wave, LogMelFront(), lengths))


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"log_mel: wave must have shape \(batch, samples\), got \(2, 1, 4000\)"
    ):
        log_mel(noise(2, 1, 4000), LogMelFront())
