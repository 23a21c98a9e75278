"""Front ends of data2vec 2.0 encoders for Hugging Face transformers: features of pictures, waves and tokens,
and where they stand."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size = tuple(config.image_size)
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values, mask=None):
        if tuple(pixel_values.shape[2:]) != self.size:
            raise ValueError(f"pixel_values must be {self.size} pixels, got {tuple(pixel_values.shape[2:])}")
        return self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class FixedPositions(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.grid = [side // config.patch_size for side in config.image_size]
        table = torch.zeros(1, self.grid[0] * self.grid[1], config.hidden_size)
        self.positions = nn.Parameter(table, requires_grad=False)

    def fill(self):
        self.positions.data.copy_(sincos_positions(self.positions.shape[2], *self.grid))


def sincos_positions(width, rows, columns):
    """[T, width]: sine and cosine of a token's column, then of its row (MAE's pos_embed.py)."""
    place = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (rows, columns)))
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [place[:, axis : axis + 1] * omega for axis in (1, 0)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


class WaveformEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.conv_layers = nn.ModuleList()
        channels = 1
        for width, kernel, stride in config.conv_layers:
            conv = nn.Conv1d(channels, width, kernel, stride, bias=False)
            norm = nn.Sequential(nn.Identity(), nn.LayerNorm(width))
            self.conv_layers.append(nn.ModuleDict({"0": conv, "2": norm}))
            channels = width
        self.width = channels

    def forward(self, input_values, mask=None):
        x = input_values.unsqueeze(1).to(self.conv_layers[0]["0"].weight.dtype)
        for layer in self.conv_layers:
            x = F.gelu(layer["2"](layer["0"](x).transpose(1, 2))).transpose(1, 2)
        return x.transpose(1, 2)


class LogMelSpectra(nn.Module):
    """Log-mel spectra, `stack` of them a frame, each band normalised over what is no padding."""

    floor, eps = 1e-2, 1e-5

    def __init__(self, config):
        super().__init__()
        for name, value in config.log_mel.items():
            setattr(self, name, value)
        self.width = self.mels * self.stack

    def filters(self, bins, device):
        """[bins, mels]: triangles on the scale 2595 log10(1 + f / 700), up to half the sample rate."""
        top = 2595.0 * torch.log10(torch.tensor(1.0 + self.sample_rate / 2 / 700.0, device=device))
        mel = torch.linspace(0.0, 1.0, self.mels + 2, device=device) * top
        edge = 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
        frequency = torch.linspace(0.0, self.sample_rate / 2, bins, device=device)[:, None]
        rising = (frequency - edge[:-2]) / (edge[1:-1] - edge[:-2])
        falling = (edge[2:] - frequency) / (edge[2:] - edge[1:-1])
        return torch.minimum(rising, falling).clamp(min=0.0)

    def forward(self, input_values, mask=None):
        wave = input_values.float()
        spectra = ((wave.shape[1] - self.window) // self.hop + 1) // self.stack * self.stack
        size = 1 << (self.window - 1).bit_length()
        frames = wave.unfold(1, self.window, self.hop)[:, :spectra]
        window = torch.hann_window(self.window, device=wave.device)
        power = torch.fft.rfft(frames * window, n=size).abs().square()
        mel = (power @ self.filters(size // 2 + 1, wave.device) + self.floor).log()
        weight = torch.ones_like(mel[..., :1])
        if mask is not None:
            frames = ((mask.sum(1) - self.window).div(self.hop, rounding_mode="floor") + 1) // self.stack
            weight = (torch.arange(spectra, device=wave.device) < (frames * self.stack)[:, None])[..., None]
            weight = weight.to(mel.dtype)
        count = weight.sum(1, keepdim=True).clamp(min=1.0)
        centred = mel - (mel * weight).sum(1, keepdim=True) / count
        variance = (centred.square() * weight).sum(1, keepdim=True) / count
        mel = centred * (variance + self.eps).rsqrt() * weight
        return mel.reshape(len(wave), -1, self.width)


def alibi_slopes(heads):
    """A geometric sequence, interleaved where `heads` is no power of two (Press et al., 2022)."""

    def powers(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start ** (i + 1) for i in range(n)]

    closest = 2 ** math.floor(math.log2(heads))
    return powers(closest) + (powers(2 * closest)[0::2][: heads - closest] if closest != heads else [])


class TextEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pad = config.pad_token_id
        rows = config.max_positions + self.pad + 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.pad)
        self.embed_positions = nn.Embedding(rows, config.hidden_size, self.pad)
        self.layernorm_embedding = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids, mask=None):
        real = input_ids.ne(self.pad)
        positions = torch.cumsum(real, 1) * real + self.pad
        return self.layernorm_embedding(self.embed_tokens(input_ids) + self.embed_positions(positions))
