"""Log-mel spectra as tokens: what `LogMelFront` reads in place of the raw waveform.

Not part of data2vec 2.0. A toy waveform encoder collapses (fairseq issue 5239); these features have
nothing to learn, so nothing to collapse. Written out here because the tokens must be counted exactly as
`LogMelFront.frames` does (no centre padding) and the statistics must not see padding.
"""

# B batch, S samples, F spectra, T tokens, W window, Q frequencies

from __future__ import annotations

import torch
from torch import Tensor

from ..config.fronts import LogMelFront

LOG_FLOOR = 1e-2
"""added to the power of a band before the logarithm: about 50 dB below the mean of a unit-variance wave"""
VARIANCE_EPS = 1e-5


def mel_filters(front: LogMelFront, bins: int, device: torch.device | str = "cpu") -> Tensor:
    """Triangular filters on HTK's mel scale, 2595 log10(1 + f / 700), from 0 Hz to half the sample rate.

    Height 1; the feet of each filter are the centres of its neighbours.

    bins: frequencies of the power spectrum, n_fft // 2 + 1. Returns [bins, mels] float32.
    """
    top = 2595.0 * torch.log10(torch.full((), 1.0 + front.sample_rate / 2 / 700.0, device=device))
    mel = torch.linspace(0.0, 1.0, front.mels + 2, device=device) * top
    edge = 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    frequency = torch.linspace(0.0, front.sample_rate / 2, bins, device=device)[:, None]
    rising = (frequency - edge[:-2]) / (edge[1:-1] - edge[:-2])
    falling = (edge[2:] - frequency) / (edge[2:] - edge[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0)


def log_mel(
    wave: Tensor, front: LogMelFront, lengths: Tensor | None = None, *, normalise: bool = True
) -> Tensor:
    """Stacked log-mel spectra: power under a periodic Hann window, no centre padding, natural logarithm.

    wave: [B, samples], computed in float32.
    lengths: [B] samples that are not padding; none: all.
    normalise: per utterance and mel band, zero mean and unit variance over time (padding left out).

    Returns [B, front.frames(samples), front.mels * front.stack] float32; tokens that see padding are 0.
    """
    if wave.ndim != 2:
        raise ValueError(f"log_mel: wave must have shape (batch, samples), got {tuple(wave.shape)}")
    tokens = front.frames(wave.shape[1])
    if tokens == 0:
        return wave.new_zeros(wave.shape[0], 0, front.width, dtype=torch.float32)
    spectra = tokens * front.stack
    n_fft = 1 << (front.window - 1).bit_length()
    frames_BFW = wave.float().unfold(1, front.window, front.hop)[:, :spectra]
    window = torch.hann_window(front.window, device=wave.device)
    power_BFQ = torch.fft.rfft(frames_BFW * window, n=n_fft).abs().square()
    mel = (power_BFQ @ mel_filters(front, n_fft // 2 + 1, wave.device) + LOG_FLOOR).log()

    valid = None
    if lengths is not None:
        kept = front.frames(lengths.to(wave.device)) * front.stack
        valid = torch.arange(spectra, device=wave.device) < kept[:, None]
        valid = valid[..., None].to(mel.dtype)
    if normalise:
        weight = torch.ones_like(mel[..., :1]) if valid is None else valid
        count = weight.sum(1, keepdim=True).clamp(min=1.0)
        centred = mel - (mel * weight).sum(1, keepdim=True) / count
        variance = (centred.square() * weight).sum(1, keepdim=True) / count
        mel = centred * (variance + VARIANCE_EPS).rsqrt()
    if valid is not None:
        mel = mel * valid
    return mel.reshape(wave.shape[0], tokens, front.width)
