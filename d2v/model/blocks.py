"""The post-norm transformer block, built from d2vkern's ops, and what its attention needs to know.

N sequences, S tokens, D width, H heads. Parameters are fp32; activations have the dtype that comes in, and
weights are cast to it at each use (gradients return in fp32).
Source: fairseq examples/data2vec/models/modalities/modules.py, AltBlock with layer_norm_first=False.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2vkern

from ..config.model import ModelConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""train.precision -> dtype of activations and matrix products"""


class AttentionContext(NamedTuple):
    """What every block of one pass shares."""

    positions: Tensor | None = None
    """[N, S] int32 original positions, -1 for extra tokens"""
    slopes: Tensor | None = None
    """[H] ALiBi slopes"""
    alibi_scale: Tensor | None = None
    """[H] learned factor of the slopes"""
    lengths: Tensor | None = None
    """[N] int32, tokens before the padding"""


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in x's dtype."""
    return d2vkern.linear(x, layer.weight, layer.bias)


def layer_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """The layer in x's dtype, statistics and the parameters' gradients in fp32.

    A CPU's kernel (torch 2.13) would add 16-bit gradients of weight and bias up in 16 bits.
    """
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype.itemsize == 2 else x.dtype
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    return F.layer_norm(x.to(dtype), layer.normalized_shape, weight, bias, layer.eps).to(x.dtype)


def alibi_slopes(heads: int) -> Tensor:
    """[H] fp32 slopes of ALiBi: a geometric sequence, interleaved when `heads` is no power of two.

    Source: Press et al., 2022; fairseq models/modalities/base.py, get_alibi.
    """

    def powers(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start ** (i + 1) for i in range(n)]

    closest = 2 ** math.floor(math.log2(heads))
    slopes = powers(closest)
    if closest != heads:
        slopes += powers(2 * closest)[0::2][: heads - closest]
    return torch.tensor(slopes)


class Attention(nn.Module):
    """The two projections of self-attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    """The two layers of the feed-forward network."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """x -> norm1(x + attention(x)) = r -> norm2(r + mlp(r)); mlp(r) is the layer's target."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.norm1 = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.attn = Attention(cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.mlp = Mlp(cfg.dim, int(cfg.dim * cfg.mlp_ratio))
        self.drop_path = 0.0
        """probability that a sequence skips each half of the block; pretraining has none"""

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """x [N,S,D] -> the block's output, and its FFN output before dropout, residual and norm2."""
        residual, ffn = self.halves(x, context)
        norm = self.norm2
        out = d2vkern.residual_norm(
            residual,
            ffn,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=self.cfg.post_mlp_dropout if self.training else 0.0,
            drop_path_p=self.drop_path if self.training else 0.0,
        )
        return out, ffn

    def halves(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """The normed residual stream after attention, and the FFN output: a last teacher block ends here."""
        cfg, drop = self.cfg, self.training
        n, s, d = x.shape
        qkv = linear(x, self.attn.qkv).view(n, s, 3, cfg.heads, d // cfg.heads)
        attended = d2vkern.multimask_attention(
            qkv,
            **context._asdict(),
            dropout_p=cfg.attention_dropout if drop else 0.0,
            padded_rows="attend",
        )
        norm = self.norm1
        residual = d2vkern.residual_norm(
            x,
            linear(attended, self.attn.proj),
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=cfg.encoder_dropout if drop else 0.0,
            drop_path_p=self.drop_path if drop else 0.0,
        )
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        ffn = d2vkern.gelu_mlp(
            residual,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            dropout_p=cfg.activation_dropout if drop else 0.0,
        )
        return residual, ffn
