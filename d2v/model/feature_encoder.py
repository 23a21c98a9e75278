"""What turns a source into local features [B, T, D]: patches, speech frames, token embeddings.

Parameter names are the original's, so state dicts interchange with it. Positions that depend on the masked
version (the speech positional encoder) are the encoder's business: encoder.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2vkern

from ..config.fronts import Front, ImageFront, LogMelFront, TextFront, WaveformFront
from ..config.model import ModelConfig
from .blocks import layer_norm, linear
from .logmel import log_mel


def sincos_positions(dim: int, grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """[T, dim] fixed 2-D sine-cosine table, row-major; the first half encodes the column, as in MAE.

    Source: MAE, util/pos_embed.py, get_2d_sincos_pos_embed, computed in fp64.
    """
    row, column, number = (
        torch.arange(size, dtype=torch.float64, device=device) for size in (*grid, dim // 4)
    )
    rows, columns = torch.meshgrid(row, column, indexing="ij")
    omega = 10_000.0 ** -(number / (dim / 4))
    halves = []
    for position in (columns, rows):
        angle = position.reshape(-1, 1) * omega
        halves += [torch.sin(angle), torch.cos(angle)]
    return torch.cat(halves, dim=1).float()


def patchify(pictures: Tensor, front: ImageFront) -> Tensor:
    """[B,C,H,W] -> [B,T,C,p,p]: the patches of each picture, row by row."""
    (rows, columns), p = front.grid, front.patch
    patches = pictures.reshape(-1, front.channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(1, 2)


class PatchEmbed(nn.Module):
    """Image [B,C,H,W] -> [B,T,D]: a convolution whose stride is its kernel, as one matrix product."""

    def __init__(self, cfg: ModelConfig, front: ImageFront) -> None:
        super().__init__()
        self.proj = nn.Conv2d(front.channels, cfg.dim, front.patch, front.patch)
        nn.init.xavier_uniform_(self.proj.weight.data.view(cfg.dim, -1))
        self.front = front

    def forward(self, source: Tensor) -> Tensor:
        front = self.front
        expected = (front.channels, front.height, front.width)
        if source.dim() != 4 or source.shape[1:] != expected:
            raise ValueError(f"Data2Vec: source must have shape (B, {', '.join(map(str, expected))}), "
                             f"got {tuple(source.shape)}")  # fmt: skip
        patches = patchify(source, front).flatten(2)
        return d2vkern.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class WaveformEncoder(nn.Module):
    """Waveform [B,samples] -> [B,T,C]: the strided convolutions of wav2vec 2.0, LayerNorm in every layer."""

    def __init__(self, front: WaveformFront) -> None:
        super().__init__()
        self.front = front
        self.conv_layers = nn.ModuleList()
        channels = 1
        for width, kernel, _ in front.conv_layers:
            conv = nn.Conv1d(channels, width, kernel, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            # the original's Sequential: conv, dropout, Sequential(transpose, norm, transpose), GELU
            norm = nn.Sequential(nn.Identity(), nn.LayerNorm(width))
            self.conv_layers.append(nn.ModuleDict({"0": conv, "2": norm}))
            channels = width

    def forward(self, source: Tensor) -> Tensor:
        x = source.unsqueeze(2)
        for layer, (_, _, stride) in zip(self.conv_layers, self.front.conv_layers, strict=True):
            conv, norm = layer.get_submodule("0"), layer.get_submodule("2.1")
            assert isinstance(conv, nn.Conv1d) and isinstance(norm, nn.LayerNorm)
            x = d2vkern.conv_stem(x, conv.weight, stride, norm.weight, norm.bias, norm.eps)
        return x


class TextEmbedding(nn.Module):
    """Token ids [B,T] -> [B,T,D]: token + learned position (0 for padding), LayerNorm, dropout."""

    def __init__(self, cfg: ModelConfig, front: TextFront) -> None:
        super().__init__()
        self.front = front
        self.embed_tokens = nn.Embedding(front.vocab_size, cfg.dim, padding_idx=front.pad_id)
        rows = front.max_positions + front.pad_id + 1
        self.embed_positions = nn.Embedding(rows, cfg.dim, padding_idx=front.pad_id)
        self.layernorm_embedding = nn.LayerNorm(cfg.dim)

    def forward(self, source: Tensor) -> Tensor:
        front = self.front
        real = source.ne(front.pad_id)
        positions = torch.cumsum(real, dim=1) * real + front.pad_id
        x = self.embed_tokens(source) + self.embed_positions(positions)
        x = layer_norm(x, self.layernorm_embedding)
        return F.dropout(x, front.dropout, self.training)


def project_features(cfg: ModelConfig, width: int) -> nn.Sequential:
    """LayerNorm and Linear from speech features to the model's width; entry 0 is the original's transpose."""
    return nn.Sequential(nn.Identity(), nn.LayerNorm(width), nn.Linear(width, cfg.dim))


def check_source(cfg: ModelConfig, source: Tensor) -> None:
    """Raise ValueError or TypeError where a source does not fit the front end; patches check their shape."""
    front = cfg.front
    if isinstance(front, TextFront):
        if source.dtype != torch.int64 or source.dim() != 2:
            raise TypeError(
                f"Data2Vec: source must be (B, T) int64 token ids, got {tuple(source.shape)} {source.dtype}"
            )
        if source.shape[1] > front.max_positions:
            raise ValueError(
                f"Data2Vec: source must have at most {front.max_positions} tokens, got {source.shape[1]}"
            )
        return
    if not source.is_floating_point():
        raise TypeError(f"Data2Vec: source must be floating point, got {source.dtype}")
    if isinstance(front, (WaveformFront, LogMelFront)):
        if source.dim() != 2:
            raise ValueError(f"Data2Vec: source must have shape (B, samples), got {tuple(source.shape)}")
        if source.shape[1] < front.receptive_field:
            raise ValueError(
                f"Data2Vec: source must have at least {front.receptive_field} samples "
                f"(the receptive field of one token), got {source.shape[1]}"
            )


def speech_features(
    front: WaveformFront | LogMelFront,
    encoder: nn.Module | None,
    projection: nn.Sequential,
    source: Tensor,
    lengths: Tensor | None,
) -> Tensor:
    """Waveform [B,samples] (with `lengths` [B] samples before the padding) -> local features [B,T,D]."""
    if encoder is None:
        assert isinstance(front, LogMelFront)
        x = log_mel(source.float(), front, lengths).to(source.dtype)
    else:
        x = encoder(source)
    norm, proj = projection[1], projection[2]
    assert isinstance(norm, nn.LayerNorm) and isinstance(proj, nn.Linear)
    return linear(layer_norm(x, norm), proj)


def padding_of(lengths: Tensor | None, tokens: int) -> Tensor | None:
    """[B,tokens] bool, True behind each of `lengths` [B]; none without them."""
    if lengths is None:
        return None
    return torch.arange(tokens, device=lengths.device) >= lengths.unsqueeze(1)


def token_lengths(
    front: Front, source: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """[B] samples and [B] int32 tokens before the padding; none without a padding mask."""
    if padding_mask is None or isinstance(front, ImageFront):
        return None, None
    if padding_mask.shape != source.shape:
        raise ValueError(f"Data2Vec: padding_mask must have shape {tuple(source.shape)} like source, "
                         f"got {tuple(padding_mask.shape)}")  # fmt: skip
    lengths = (~padding_mask.bool()).sum(1)
    if padding_mask.device.type == "cpu":  # elsewhere the check would wait for the device
        suffix = torch.arange(source.shape[1]) >= lengths.unsqueeze(1)
        if not torch.equal(suffix, padding_mask.bool()):
            row = int((suffix != padding_mask.bool()).any(1).nonzero()[0])
            raise ValueError(
                f"Data2Vec: padding_mask must mark the end of each row, got other padding in row {row}"
            )
    if isinstance(front, TextFront):
        return lengths, lengths.int()
    return lengths, front.frames(lengths).int()
