"""An encoder with a task's head: logits of whole samples. Parameter names are the original's.

classify: mean over tokens without CLS -> LayerNorm -> linear (models/mae_image_classification.py; speech
likewise, padding left out). ctc: linear at every frame, padded frames forced to blank
(fairseq/models/wav2vec/wav2vec2_asr.py, wav2vec_ctc). sentence: first token -> dropout -> linear -> tanh ->
dropout -> linear (models/data2vec_text_classification.py, RobertaClassificationHead).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2vkern._nvtx import phase

from ..config.fronts import WaveformFront
from ..config.model import ModelConfig
from ..config.tune import DropConfig, FineTuneConfig, HeadConfig, check_task
from .blocks import PRECISIONS, Block, layer_norm, linear
from .encoder import Network, run_blocks
from .feature_encoder import padding_of, token_lengths
from .huggingface import HuggingFaceBackbone
from .pool import mean_over_tokens

BLANK = 0
"""fairseq's <s>"""


class Backbone(Network):
    """The student's encoder alone: no decoder, no teacher."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg, local=True, decoder=False)
        self.cfg = cfg
        self.compute_dtype = torch.float32
        self.encoder.prenet_layerdrop = cfg.layerdrop

    def forward(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        time_mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Output of the last block [B,E+T,D], extra tokens first, and the padding [B,T] (True) or None.

        time_mask: [B,T] bool, equally many in each row: local features that become noise; channel_mask: [B,D]
            bool, that become 0. noise: [B,n,D] N(0, 1) for the n masked frames of each row; None: drawn here.
        """
        samples, lengths = token_lengths(self.cfg.front, source, padding_mask)
        with phase("student/front"):
            local = self.encoder.local(source, samples, self.compute_dtype)
            if time_mask is not None:
                std, places = self.cfg.decoder.noise_std, time_mask.unsqueeze(-1)
                if noise is None:
                    local = torch.where(places, torch.randn_like(local) * std, local)
                else:
                    local = local.masked_scatter(places, (noise * std).to(local.dtype))
            if channel_mask is not None:
                local = local.masked_fill(channel_mask.unsqueeze(1), 0.0)
            x, context = self.encoder.contextualise(local, None, lengths)
        x = run_blocks(self.blocks, x, context, self.cfg.layerdrop if self.training else 0.0)
        return x, padding_of(lengths, local.shape[1])

    def set_drop_path(self, largest: float) -> None:
        """Drop path of each block: linspace(0, largest) over the main depth; the prenet takes its first
        ones, the main blocks what is left, spread anew (mae_image_classification.py)."""
        prenet = list(self.encoder.context_encoder.blocks)
        rates = torch.linspace(0, largest, len(self.blocks), device="cpu").tolist()
        first = rates[: len(prenet)]
        left = rates[min(len(prenet), len(rates) - 1)]
        rest = torch.linspace(left, largest, len(self.blocks), device="cpu").tolist()
        for block, rate in zip([*prenet, *self.blocks], [*first, *rest], strict=True):
            assert isinstance(block, Block)
            block.drop_path = rate


class FineTuned(nn.Module):
    """A fine-tuned encoder: `logits` is what it is for.

    cfg: the encoder's, with fine-tuning's dropouts. head: the task, with a positive number of outputs.
    drop: rates that are the run's own (drop path, the head's dropout); none while only evaluating.
    backbone: a model of transformers as the encoder, in place of one of ours.
    Raises ValueError where the task does not fit the encoder's modality.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        head: HeadConfig,
        drop: DropConfig | None = None,
        backbone: HuggingFaceBackbone | None = None,
    ) -> None:
        super().__init__()
        check_task(head.task, cfg.modality)
        if head.outputs < 1:
            raise ValueError(f"finetune: head.outputs must be positive, got {head.outputs}")
        self.cfg, self.head_cfg = cfg, head
        self.drop = drop or DropConfig()
        encoder: Backbone | HuggingFaceBackbone
        if backbone is None:
            encoder = Backbone(cfg)
            encoder.set_drop_path(self.drop.path)
        else:
            encoder = backbone
        outputs, dim = head.outputs, cfg.dim
        if head.task == "ctc":
            self.w2v_encoder = nn.ModuleDict({"w2v_model": encoder, "proj": nn.Linear(dim, outputs)})
        else:
            self.model = encoder
        if head.task == "classify":
            self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
            self.head = nn.Linear(dim, outputs)
        elif head.task == "sentence":
            layers = {"dense": nn.Linear(dim, dim), "out_proj": nn.Linear(dim, outputs)}
            self.classification_heads = nn.ModuleDict({"sentence_classification_head": nn.ModuleDict(layers)})
        self._initialise_head()

    @property
    def backbone(self) -> Backbone | HuggingFaceBackbone:
        """The encoder."""
        found: Any = self.w2v_encoder["w2v_model"] if self.head_cfg.task == "ctc" else self.model
        return found

    @property
    def modality(self) -> str:
        return self.cfg.modality

    def forward(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        time_mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        train_encoder: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits in fp32, [B,C], or for ctc [B,T,V], and the padding [B,T] (True) of speech or None.

        train_encoder: False keeps the encoder out of the gradient.
        See `Data2Vec.forward` for source and padding_mask, `Backbone.forward` for the masks and their noise.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_encoder):
            x, padded = self.backbone(source, padding_mask, time_mask, channel_mask, noise)
        extra = self.cfg.front.extra_tokens
        with phase("head"):
            if self.head_cfg.task == "ctc":
                projection = self.w2v_encoder["proj"]
                assert isinstance(projection, nn.Linear)
                logits = linear(x[:, extra:], projection).float()
                if padded is not None:
                    forced = torch.full(logits.shape[-1:], float("-inf"), device=logits.device)
                    forced[BLANK] = 0.0
                    logits = torch.where(padded.unsqueeze(-1), forced, logits)
                return logits, padded
            if self.head_cfg.task == "classify":
                pooled = layer_norm(mean_over_tokens(x[:, extra:], padded), self.fc_norm)
                return linear(pooled, self.head).float(), padded
            head = self.classification_heads["sentence_classification_head"]
            dense, out = head.get_submodule("dense"), head.get_submodule("out_proj")
            assert isinstance(dense, nn.Linear) and isinstance(out, nn.Linear)
            first = F.dropout(x[:, extra], self.drop.head, self.training)
            hidden = F.dropout(torch.tanh(linear(first, dense)), self.drop.head, self.training)
            return linear(hidden, out).float(), padded

    def logits(self, source: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """[B,C] fp32, or for ctc [B,T,V]: what the original's forward gives in eval mode."""
        return self(source, padding_mask)[0]

    def to_device(self, device: torch.device, precision: str) -> FineTuned:
        """On `device`, activations in the precision's dtype; parameters stay fp32."""
        self.backbone.compute_dtype = PRECISIONS[precision]
        return self.to(device)

    def freeze_front(self) -> None:
        """The convolutions of a waveform's front end keep their weights."""
        if not isinstance(self.backbone, Backbone):
            return self.backbone.freeze_front()
        if not isinstance(self.cfg.front, WaveformFront):
            kind = type(self.cfg.front).__name__
            raise ValueError(f"finetune: train.freeze_front needs a waveform front end, got {kind}")
        assert self.backbone.encoder.local_encoder is not None
        self.backbone.encoder.local_encoder.requires_grad_(False)

    @torch.no_grad()
    def _initialise_head(self) -> None:
        """truncated normal (classify), torch's default (sentence), Xavier (ctc); biases of linears 0."""
        if self.head_cfg.task == "classify":
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            self.head.bias.zero_()
        elif self.head_cfg.task == "ctc":
            projection = self.w2v_encoder["proj"]
            assert isinstance(projection, nn.Linear)
            nn.init.xavier_uniform_(projection.weight)
            projection.bias.zero_()


def build_tuned(cfg: FineTuneConfig, drop: DropConfig | None = None) -> FineTuned:
    """A new model of a run's config. drop: rates while training; none: for evaluation."""
    if cfg.transformers is None:
        return FineTuned(cfg.model, cfg.head, drop)
    return FineTuned(cfg.model, cfg.head, drop, HuggingFaceBackbone(cfg.transformers, cfg.model))
