"""data2vec 2.0 encoders (Baevski et al., 2022) for Hugging Face transformers, in plain PyTorch.

Pictures: pixel_values [B,C,H,W]. Speech: input_values [B,samples], normalised per utterance, with
attention_mask [B,samples]. Text: input_ids [B,T] that begin with <s>, with attention_mask [B,T]. Masks are 1
for what is real and end in padding. Of pictures the first token is CLS. Parameters carry the original's
names. Inference and fine-tuning with dropout 0, in any dtype, with gradient checkpointing; no pretraining.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)

from .configuration_data2vec2 import Data2Vec2Config
from .fronts_data2vec2 import (
    FixedPositions,
    LogMelSpectra,
    PatchEmbed,
    TextEmbedding,
    WaveformEncoder,
    alibi_slopes,
)

INPUTS = {"image": "pixel_values", "audio": "input_values", "text": "input_ids"}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, bias):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv, attn_mask=None if bias is None else bias.to(x.dtype))
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(GradientCheckpointingLayer):
    """Post-norm: x -> norm1(x + attention(x)) = r -> norm2(r + mlp(r))."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x, bias):
        x = self.norm1(x + self.attn(x, bias))
        return self.norm2(x + self.mlp(x))


class ContextEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.prenet_depth))
        norm = config.modality != "text" or config.prenet_depth > 0
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if norm else None


class ModalityEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        extra = config.extra_tokens
        self.extra_tokens = nn.Parameter(torch.zeros(1, extra, width)) if extra else None
        self.context_encoder = ContextEncoder(config)
        if config.modality == "image":
            self.local_encoder = PatchEmbed(config)
            self.fixed_positional_encoder = FixedPositions(config)
        elif config.modality == "text":
            self.local_encoder = TextEmbedding(config)
        else:
            spectra = config.log_mel is not None
            self.local_encoder = LogMelSpectra(config) if spectra else WaveformEncoder(config)
            read = self.local_encoder.width
            self.project_features = nn.Sequential(nn.Identity(), nn.LayerNorm(read), nn.Linear(read, width))
            kernel, groups = config.position_kernel, config.position_groups
            convolutions = [
                nn.Sequential(nn.Conv1d(width, width, kernel, groups=groups))
                for _ in range(config.position_layers)
            ]
            self.relative_positional_encoder = nn.Sequential(nn.Identity(), *convolutions)
            if config.alibi:
                self.alibi_scale = nn.Parameter(torch.ones(1, 1, config.num_attention_heads, 1, 1))

    def forward(self, source, mask):
        """Input of the first block, and the bias of attention."""
        x = self.local_encoder(source, mask)
        if self.config.modality == "image":
            x = x + self.fixed_positional_encoder.positions
        elif self.config.modality == "audio":
            x = self.project_features(x.to(self.project_features[2].weight.dtype))
            x = x + self._positions(x)
            mask = self._frames(mask, x.shape[1])
        bias = self._bias(x, mask)
        if self.extra_tokens is not None:
            x = torch.cat([self.extra_tokens.expand(x.shape[0], -1, -1), x], 1)
        if self.context_encoder.norm is not None:
            x = self.context_encoder.norm(x)
        return x, bias

    def _positions(self, x):
        """Convolutions, each with LayerNorm without parameters and GELU, same length."""
        kernel = self.config.position_kernel
        for layer in list(self.relative_positional_encoder)[1:]:
            conv = layer[0]
            padded = F.pad(x.transpose(1, 2), (kernel // 2, kernel - 1 - kernel // 2))
            y = F.conv1d(padded, conv.weight, conv.bias, groups=self.config.position_groups).transpose(1, 2)
            x = F.gelu(F.layer_norm(y, y.shape[2:]))
        return x

    def _frames(self, mask, frames):
        """[B,samples] 1 where real -> [B,T]."""
        if mask is None:
            return None
        lengths = mask.sum(1)
        for kernel, stride in self.config.strides:
            lengths = torch.where(lengths < kernel, 0, (lengths - kernel) // stride + 1)
        return torch.arange(frames, device=mask.device) < lengths.unsqueeze(1)

    def _bias(self, x, mask):
        """[B,H or 1,1 or S,S] added to the logits of attention, or None."""
        extra, tokens = self.config.extra_tokens, x.shape[1]
        bias = None
        if self.config.modality == "audio" and self.config.alibi:
            place = torch.arange(tokens, device=x.device)
            distance = F.pad((place - place.unsqueeze(1)).abs().float(), (extra, 0, extra, 0))
            slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=x.device)
            slopes = slopes * self.alibi_scale.flatten().float().clamp(min=0)
            bias = -slopes.view(1, -1, 1, 1) * distance
        if mask is not None and not bool(mask.all()):
            seen = F.pad(mask.bool(), (extra, 0), value=True)[:, None, None]
            hidden = torch.zeros(seen.shape, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)
            bias = hidden if bias is None else (bias + hidden).clamp(min=torch.finfo(x.dtype).min)
        return bias


class Data2Vec2PreTrainedModel(PreTrainedModel):
    config_class = Data2Vec2Config
    base_model_prefix = "data2vec2"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    """losses are means over a batch, which Trainer divides by its accumulation steps"""
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        self.main_input_name = INPUTS[config.modality]

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FixedPositions):
            module.fill()
        elif isinstance(module, ModalityEncoder):
            if module.extra_tokens is not None:
                nn.init.normal_(module.extra_tokens)
            if hasattr(module, "alibi_scale"):
                nn.init.ones_(module.alibi_scale)


class Data2Vec2Model(Data2Vec2PreTrainedModel):
    """The encoder. last_hidden_state [B,S,D]; hidden_states: its input and every block's output."""

    def __init__(self, config):
        super().__init__(config)
        self.modality_encoders = nn.ModuleDict({config.modality.upper(): ModalityEncoder(config)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        encoder = self.modality_encoders[self.config.modality.upper()].local_encoder
        return encoder.embed_tokens if self.config.modality == "text" else encoder

    def forward(
        self,
        pixel_values=None,
        input_values=None,
        input_ids=None,
        attention_mask=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        source = {"image": pixel_values, "audio": input_values, "text": input_ids}[self.config.modality]
        if source is None:
            raise ValueError(f"a model of {self.config.modality} needs {self.main_input_name}")
        encoder = self.modality_encoders[self.config.modality.upper()]
        x, bias = encoder(source, attention_mask)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = (x,) if wanted else None
        for block in [*encoder.context_encoder.blocks, *self.blocks]:
            x = block(x, bias)
            states = (*states, x) if wanted else None
        return in_form(BaseModelOutput(last_hidden_state=x, hidden_states=states), self.config, return_dict)


def in_form(output, config, return_dict):
    """As transformers hands it out: a dict by default, or a tuple of what is there."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class _Head(Data2Vec2PreTrainedModel):
    """What heads share: the encoder runs, `_logits` reads its tokens, `_loss` compares with labels."""

    output_class = SequenceClassifierOutput

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2Model(config)

    def _run(self, source, attention_mask, labels, output_hidden_states, return_dict):
        made = self.data2vec2(
            **{self.main_input_name: source},
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        x, real = made.last_hidden_state[:, self.config.extra_tokens :], None
        if self.config.modality == "audio":
            real = self.data2vec2.modality_encoders["AUDIO"]._frames(attention_mask, x.shape[1])
        logits = self._logits(x, real)
        loss = None if labels is None else self._loss(logits, labels, real)
        output = self.output_class(loss=loss, logits=logits, hidden_states=made.hidden_states)
        return in_form(output, self.config, return_dict)

    def _loss(self, logits, labels, real):
        """Squared error for one output, cross-entropy otherwise."""
        if self.config.num_labels == 1:
            return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        return F.cross_entropy(logits, labels)


class _Classifier(_Head):
    """LayerNorm of the mean over tokens, padding left out, then a linear layer."""

    def __init__(self, config):
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _logits(self, x, real):
        if real is None:
            pooled = x.mean(1)
        else:
            real = real.unsqueeze(2)
            pooled = (x * real).sum(1) / real.sum(1).clamp(min=1)
        return self.head(self.fc_norm(pooled)).float()


class Data2Vec2ForImageClassification(_Classifier):
    output_class = ImageClassifierOutput

    def forward(self, pixel_values=None, labels=None, output_hidden_states=None, return_dict=None, **kwargs):
        return self._run(pixel_values, None, labels, output_hidden_states, return_dict)


class _OfSpeech:
    """What a head reads that hears."""

    def forward(
        self,
        input_values=None,
        attention_mask=None,
        labels=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        return self._run(input_values, attention_mask, labels, output_hidden_states, return_dict)


class Data2Vec2ForAudioClassification(_OfSpeech, _Classifier):
    """As pictures are classified, without the padding."""


class Data2Vec2ForSequenceClassification(_Head):
    """The first token through a hidden layer with tanh."""

    def __init__(self, config):
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _logits(self, x, real):
        return self.out_proj(torch.tanh(self.dense(x[:, 0]))).float()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        return self._run(input_ids, attention_mask, labels, output_hidden_states, return_dict)


class Data2Vec2ForCTC(_OfSpeech, _Head):
    """A linear layer over frames; padded frames are blank (id 0). labels: [B,L], negative where none is."""

    output_class = CausalLMOutput

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _logits(self, x, real):
        logits = self.lm_head(x).float()
        if real is None:
            return logits
        blank = torch.full(logits.shape[2:], float("-inf"), device=logits.device)
        blank[0] = 0.0
        return torch.where(real.unsqueeze(2), logits, blank)

    def _loss(self, logits, labels, real):
        frames = torch.full((len(logits),), logits.shape[1], device=logits.device)
        frames = frames if real is None else real.sum(1)
        log_probs, wanted = F.log_softmax(logits, 2).transpose(0, 1), labels >= 0
        return F.ctc_loss(log_probs, labels[wanted], frames, wanted.sum(1), blank=0, zero_infinity=True)
