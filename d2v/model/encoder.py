"""The modality encoder and the network of blocks: one pass over all tokens, or over the kept ones of M masks.

Both the student and the teacher are a `Network`; the teacher lacks the decoder and, where the original's
teacher reads the student's local features, the local encoder.
Source: fairseq examples/data2vec/models/modalities/{base,images,audio,text}.py and models/data2vec2.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2vkern
from d2vkern._nvtx import phase

from ..config.fronts import ImageFront, TextFront, WaveformFront
from ..config.model import ModelConfig
from .blocks import AttentionContext, Block, alibi_slopes, layer_norm
from .decoder import Decoder
from .feature_encoder import (
    PatchEmbed,
    TextEmbedding,
    WaveformEncoder,
    check_source,
    project_features,
    sincos_positions,
    speech_features,
)


class FixedPositions(nn.Module):
    """The sine-cosine table as a parameter without gradient: the original keeps it in its state dict."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.positions = nn.Parameter(table.unsqueeze(0), requires_grad=False)


class ContextEncoder(nn.Module):
    """LayerNorm of the embeddings, dropout, and the prenet's blocks; text without blocks has none of it."""

    def __init__(self, cfg: ModelConfig, norm: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.prenet_depth))
        self.norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps) if norm else None


class ModalityEncoder(nn.Module):
    """Source -> local features -> tokens with positions, masked or not -> prenet."""

    slopes: Tensor | None

    def __init__(self, cfg: ModelConfig, *, local: bool, decoder: bool) -> None:
        super().__init__()
        front = cfg.front
        self.cfg = cfg
        self.extra_tokens: nn.Parameter | None = None
        self.local_encoder: PatchEmbed | WaveformEncoder | TextEmbedding | None = None
        if front.extra_tokens:
            self.extra_tokens = nn.Parameter(torch.randn(1, front.extra_tokens, cfg.dim))
        self.register_buffer("slopes", None, persistent=False)
        self.context_encoder = ContextEncoder(
            cfg, norm=not isinstance(front, TextFront) or cfg.prenet_depth > 0
        )
        if isinstance(front, ImageFront):
            if local:
                self.local_encoder = PatchEmbed(cfg, front)
            self.fixed_positional_encoder = FixedPositions(sincos_positions(cfg.dim, front.grid))
        elif isinstance(front, TextFront):
            if local:
                self.local_encoder = TextEmbedding(cfg, front)
        else:
            if front.alibi:
                self.alibi_scale = nn.Parameter(torch.ones(1, 1, cfg.heads, 1, 1))
                self.slopes = alibi_slopes(cfg.heads)
            if local and isinstance(front, WaveformFront):
                self.local_encoder = WaveformEncoder(front)
            self.project_features = project_features(cfg, front.width) if local else None
            kernel, groups = front.position_kernel, front.position_groups
            layers = [nn.Sequential(nn.Conv1d(cfg.dim, cfg.dim, kernel, groups=groups))
                      for _ in range(front.position_layers)]  # fmt: skip
            # entry 0 is the original's transpose
            self.relative_positional_encoder = nn.Sequential(nn.Identity(), *layers)
        self.decoder = Decoder(cfg) if decoder else None
        self.prenet_layerdrop = 0.0
        """probability of skipping a block of the prenet; pretraining has none"""

    def local(self, source: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Local features [B,T,D] in `dtype`. lengths: [B], audio samples before the padding."""
        check_source(self.cfg, source)
        front = self.cfg.front
        if isinstance(front, TextFront):
            assert self.local_encoder is not None
            return self.local_encoder(source).to(dtype)
        source = source.to(dtype)
        if isinstance(front, ImageFront):
            assert self.local_encoder is not None
            return self.local_encoder(source)
        assert self.project_features is not None
        return speech_features(front, self.local_encoder, self.project_features, source, lengths)

    def contextualise(
        self, local_BTD: Tensor, plan: d2vkern.MaskPlan | None, lengths: Tensor | None
    ) -> tuple[Tensor, AttentionContext]:
        """Tokens after the prenet, [N,E+K,D] with a plan and [B,E+T,D] without, and what attention needs.

        lengths: [B] int32, tokens before the padding.
        """
        dtype, extra = local_BTD.dtype, None
        if self.extra_tokens is not None:
            extra = self.extra_tokens[0].to(dtype)
        positions = None
        if isinstance(self.cfg.front, ImageFront):
            positions = self.fixed_positional_encoder.positions[0].to(dtype)
        per_mask = self._conv_positions(local_BTD, plan)
        if plan is not None:
            x = d2vkern.gather_tokens(local_BTD, plan, extra, positions, per_mask)
        else:
            x = local_BTD if positions is None else local_BTD + positions
            x = x if per_mask is None else x + per_mask
            if extra is not None:
                x = torch.cat([extra.expand(x.shape[0], -1, -1), x], dim=1)
        context = self._context(local_BTD, plan, lengths)
        if self.context_encoder.norm is not None:
            x = layer_norm(x, self.context_encoder.norm)
            x = F.dropout(x, self.cfg.prenet_dropout, self.training)
        layerdrop = self.prenet_layerdrop if self.training else 0.0
        for block in self.context_encoder.blocks:
            if not layerdrop or float(torch.rand(())) >= layerdrop:
                x, _ = block(x, context)
        return x, context

    def _conv_positions(self, local_BTD: Tensor, plan: d2vkern.MaskPlan | None) -> Tensor | None:
        """The convolutional positions of speech: over each masked version, its masked frames zeroed."""
        front = self.cfg.front
        if isinstance(front, (ImageFront, TextFront)):
            return None
        x = local_BTD
        for layer in list(self.relative_positional_encoder)[1:]:
            conv = layer.get_submodule("0")
            assert isinstance(conv, nn.Conv1d)
            x = d2vkern.conv_block_1d(x, conv.weight, conv.bias, front.position_groups, plan=plan)
            plan = None
        return x

    def _context(
        self, local_BTD: Tensor, plan: d2vkern.MaskPlan | None, lengths: Tensor | None
    ) -> AttentionContext:
        cfg = self.cfg
        extra = cfg.front.extra_tokens
        if plan is not None and lengths is not None:
            kept = plan.ids_keep < lengths.repeat_interleave(plan.clones).unsqueeze(1)
            lengths = kept.sum(1, dtype=torch.int32)
        if lengths is not None and extra:
            lengths = lengths + extra
        if self.slopes is None:
            return AttentionContext(lengths=lengths)
        if plan is not None:
            positions = plan.ids_keep
        else:
            b, t, _ = local_BTD.shape
            positions = torch.arange(t, dtype=torch.int32, device=local_BTD.device).expand(b, t)
        positions = F.pad(positions, (extra, 0), value=-1)
        return AttentionContext(positions, self.slopes, self.alibi_scale.flatten(), lengths)


class Network(nn.Module):
    """A modality encoder and the main blocks, under the original's names."""

    def __init__(self, cfg: ModelConfig, *, local: bool, decoder: bool) -> None:
        super().__init__()
        encoder = ModalityEncoder(cfg, local=local, decoder=decoder)
        self.modality_encoders = nn.ModuleDict({cfg.modality.upper(): encoder})
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))

    @property
    def encoder(self) -> ModalityEncoder:
        """The one modality encoder."""
        (encoder,) = self.modality_encoders.values()
        assert isinstance(encoder, ModalityEncoder)
        return encoder


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    context: AttentionContext,
    layerdrop: float = 0.0,
    graph_safe: bool = False,
) -> Tensor:
    """Through all blocks: [N,S,D].

    layerdrop: probability of skipping a block; draws come from torch's CPU generator.
    graph_safe: they come from the device's, every block is computed and the output of a skipped one dropped.
    """
    for number, block in enumerate(blocks):
        if layerdrop and not graph_safe and float(torch.rand(())) < layerdrop:
            continue
        with phase(f"student/block{number:02d}"):
            out, _ = block(x, context)
            skip = torch.rand((), device=x.device) < layerdrop if layerdrop and graph_safe else None
            x = out if skip is None else torch.where(skip, x, out)
    return x


def ffn_outputs(blocks: nn.ModuleList, x: Tensor, context: AttentionContext) -> Iterator[Tensor]:
    """The FFN output [N,S,D] of each block, one after the other; the last block stops there."""
    last = len(blocks) - 1
    for i, block in enumerate(blocks):
        assert isinstance(block, Block)
        if i == last:
            yield block.halves(x, context)[1]
        else:
            x, ffn = block(x, context)
            yield ffn
