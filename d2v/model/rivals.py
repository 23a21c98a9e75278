"""The objectives that data2vec 2.0 is compared with, on its encoder, data, optimizer and kernels.

- data2vec 1 (Baevski et al., 2022a, section 3): one masked view goes through the encoder whole, masked
  tokens as a learned embedding; a linear head predicts the teacher's averaged layers, smooth L1.
- MAE (He et al., 2022, section 3; Huang et al., 2022, for spectrograms): the encoder sees kept tokens; a
  small transformer with mask tokens predicts the input at masked places, normalised per token, squared error.
- MLM (Devlin et al., 2019; Liu et al., 2019): 80% of the chosen tokens become <mask>, 10% another token, 10%
  stay; a head tied to the embedding predicts them, cross-entropy.

The encoder is data2vec 2.0's in all of them: its blocks are post-norm, MAE's own are pre-norm.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2vkern
from d2vkern._nvtx import phase

from ..config.fronts import ImageFront, LogMelFront, TextFront
from ..config.model import ModelConfig
from .blocks import AttentionContext, Block, layer_norm, linear
from .decoder import masked_rows
from .feature_encoder import TextEmbedding, patchify, sincos_positions
from .logmel import log_mel
from .pretraining import Pretraining, PretrainOutput, regression_output, sample_rows
from .teacher import Distillation

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""mlm: of the chosen tokens, those that become <mask>, and those that become another token"""
FIRST_TOKEN = 4
"""token ids below are fairseq's specials; none of them replaces a token"""


class Data2Vec1(Distillation):
    """data2vec 1 in the encoder, teacher and targets of data2vec 2.0."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg, decoder=False)
        self.head = nn.Linear(cfg.dim, cfg.dim)
        nn.init.normal_(self.head.weight, std=cfg.init_std)
        nn.init.zeros_(self.head.bias)
        self.mask_token: nn.Parameter | None = None
        if not isinstance(cfg.front, TextFront):  # text has <mask> in its vocabulary
            self.mask_token = nn.Parameter(torch.randn(cfg.dim) * cfg.init_std)

    def _objective(
        self, source: Tensor, samples: Tensor | None, lengths: Tensor | None, plan: d2vkern.MaskPlan
    ) -> PretrainOutput:
        local = self._local(source, samples, plan)
        with phase("teacher"):
            targets = self._targets(source, local.detach(), lengths)
        with phase("student/front"):
            if self.mask_token is None:
                front = self.cfg.front
                assert isinstance(front, TextFront)
                ids = source.repeat_interleave(plan.clones, 0)
                ids = ids.masked_fill(plan.mask & (ids != front.pad_id), front.mask_id)
                masked = self.encoder.local(ids, samples, self.compute_dtype)
            else:
                token = self.mask_token.to(local.dtype)
                masked = torch.where(plan.mask.unsqueeze(2), token, local.repeat_interleave(plan.clones, 0))
            x, context = self.encoder.contextualise(masked, None, _repeated(lengths, plan))
        student = self.student(x, context)
        tokens = student[:, self.cfg.front.extra_tokens :]
        with phase("decoder"):
            prediction = linear(masked_rows(tokens, plan), self.head)
        with phase("loss"):
            regression = d2vkern.masked_regression_loss(
                prediction, targets, plan, self.cfg.loss_beta, self.cfg.loss_scale
            )
            return regression_output(
                {f"{self.modality.upper()}_regression": regression.loss},
                regression,
                student=student,
                targets=targets,
                plan=plan,
                health={"front": local, "prediction": prediction, "target": targets},
                decode=lambda: linear(tokens, self.head),
            )


class MaskedAutoencoder(Pretraining):
    """MAE: of pictures, and of log-mel spectra with one token per `front.stack` of them."""

    positions: Tensor | None

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        dec, front = cfg.mae, cfg.front
        assert isinstance(front, (ImageFront, LogMelFront))
        block = replace(
            cfg, dim=dec.dim, heads=dec.heads, encoder_dropout=0.0, attention_dropout=0.0,
            activation_dropout=0.0, post_mlp_dropout=0.0,
        )  # fmt: skip
        width = front.patch_size if isinstance(front, ImageFront) else front.width
        self.decoder_embed = nn.Linear(cfg.dim, dec.dim)
        self.mask_token = nn.Parameter(torch.zeros(dec.dim))
        self.decoder_blocks = nn.ModuleList(Block(block) for _ in range(dec.depth))
        self.decoder_pred = nn.Linear(dec.dim, width)
        table = sincos_positions(dec.dim, front.grid) if isinstance(front, ImageFront) else None
        self.register_buffer("positions", table, persistent=False)
        self._initialise()
        nn.init.normal_(self.mask_token, std=cfg.init_std)

    def _objective(
        self, source: Tensor, samples: Tensor | None, lengths: Tensor | None, plan: d2vkern.MaskPlan
    ) -> PretrainOutput:
        local = self._local(source, samples, plan)
        with phase("student/front"):
            x, context = self.encoder.contextualise(local, plan, lengths)
        student = self.student(x, context)
        with phase("decoder"):
            decoded = self._decoded(student, plan, _repeated(lengths, plan))
            prediction = linear(masked_rows(decoded, plan), self.decoder_pred)
        with phase("loss"):
            targets = self.patches(source, samples)
            regression = d2vkern.masked_regression_loss(prediction, targets, plan, 0.0, 1 / targets.shape[2])
            return regression_output(
                {f"{self.modality.upper()}_regression": regression.loss},
                regression,
                student=student,
                targets=targets,
                plan=plan,
                health={"front": local, "prediction": prediction},
                decode=lambda: linear(decoded, self.decoder_pred),
            )

    def _decoded(self, student: Tensor, plan: d2vkern.MaskPlan, lengths: Tensor | None) -> Tensor:
        """[N,T,width of the decoder], its extra tokens removed."""
        extra = self.cfg.front.extra_tokens
        x = linear(student, self.decoder_embed)
        grid = d2vkern.scatter_tokens(x, plan, 0.0, 0)
        grid = torch.where(plan.mask.unsqueeze(2), self.mask_token.to(x.dtype), grid)
        positions = self.positions
        if positions is None:
            positions = sincos_positions(x.shape[2], (1, plan.tokens), x.device)
        x = torch.cat([x[:, :extra], grid + positions.to(x.dtype)], 1)
        context = AttentionContext(lengths=None if lengths is None else lengths + extra)
        for block in self.decoder_blocks:
            x, _ = block(x, context)
        return x[:, extra:]

    @torch.no_grad()
    def patches(self, source: Tensor, samples: Tensor | None = None) -> Tensor:
        """[B,T,P] fp32: what is predicted, each token's values normalised to mean 0 and variance 1.

        Source: MAE, models_mae.py, forward_loss with norm_pix_loss (unbiased variance, eps 1e-6).
        """
        front = self.cfg.front
        if isinstance(front, LogMelFront):
            x = log_mel(source.float(), front, samples)
        else:
            assert isinstance(front, ImageFront)
            x = patchify(source.float(), front).movedim(2, -1).flatten(2)
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


class MaskedLM(Pretraining):
    """BERT's masked language model with RoBERTa's head."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        front = cfg.front
        assert isinstance(front, TextFront)
        self.lm_dense = nn.Linear(cfg.dim, cfg.dim)
        self.lm_norm = nn.LayerNorm(cfg.dim)
        self.lm_bias = nn.Parameter(torch.zeros(front.vocab_size))
        self._initialise()

    def _objective(
        self, source: Tensor, samples: Tensor | None, lengths: Tensor | None, plan: d2vkern.MaskPlan
    ) -> PretrainOutput:
        front = self.cfg.front
        assert isinstance(front, TextFront)
        with phase("student/front"):
            ids = source.repeat_interleave(plan.clones, 0)
            local = self._local(_corrupted(ids, plan.mask, front), samples, plan)
            x, context = self.encoder.contextualise(local, None, _repeated(lengths, plan))
        student = self.student(x, context)
        tokens = student[:, front.extra_tokens :]
        with phase("decoder"):
            hidden = self._hidden(masked_rows(tokens, plan))
            logits = self._logits(hidden).flatten(0, 1).float()
        with phase("loss"):
            wanted = ids.gather(1, plan.ids_mask.long()).flatten()
            loss = F.cross_entropy(logits, wanted, ignore_index=front.pad_id, reduction="sum")
            count = torch.full((), wanted.numel(), dtype=torch.int64, device=loss.device)
            return PretrainOutput(
                loss_sum=loss,
                sample_size=count,
                losses={"TEXT_mlm": loss.detach()},
                student=student,
                targets=source,
                plan=plan,
                metrics={"accuracy": (logits.detach().argmax(1) == wanted).float().mean()},
                health={"front": sample_rows(local), "prediction": sample_rows(hidden)},
                _decode=lambda: self._logits(self._hidden(tokens)),
            )

    def _hidden(self, x: Tensor) -> Tensor:
        return layer_norm(F.gelu(linear(x, self.lm_dense)), self.lm_norm)

    def _logits(self, hidden: Tensor) -> Tensor:
        embedding = self.encoder.local_encoder
        assert isinstance(embedding, TextEmbedding)
        return d2vkern.linear(hidden, embedding.embed_tokens.weight, self.lm_bias)


def _corrupted(ids: Tensor, mask: Tensor, front: TextFront) -> Tensor:
    """Token ids [N,T] with those at masked places replaced; draws come from the device's generator."""
    fate = torch.rand(ids.shape, device=ids.device)
    others = torch.randint(FIRST_TOKEN, front.vocab_size, ids.shape, device=ids.device)
    new = torch.where(fate < MASKED_SHARE, front.mask_id, others)
    new = torch.where(fate < MASKED_SHARE + RANDOM_SHARE, new, ids)
    return torch.where(mask & (ids != front.pad_id), new, ids)


def _repeated(lengths: Tensor | None, plan: d2vkern.MaskPlan) -> Tensor | None:
    """Lengths [B] of samples for the N rows of a plan."""
    return None if lengths is None else lengths.repeat_interleave(plan.clones)
