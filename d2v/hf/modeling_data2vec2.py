"""data2vec 2.0 encoders (Baevski et al., 2022) for Hugging Face transformers, in plain PyTorch.

Pictures: pixel_values [B,C,H,W]. Speech: input_values [B,samples], normalised per utterance, with
attention_mask [B,samples]. Text: input_ids [B,T] that begin with <s>, with attention_mask [B,T]. Masks are 1
for what is real and end in padding. Of pictures the first token is CLS. Parameters carry the original's
names. Inference and fine-tuning with dropout 0; no pretraining.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)

from .configuration_data2vec2 import Data2Vec2Config


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


class Block(nn.Module):
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


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size = tuple(config.image_size)
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values, mask=None):
        if tuple(pixel_values.shape[2:]) != self.size:
            raise ValueError(f"pixel_values must be {self.size} pixels, got {tuple(pixel_values.shape[2:])}")
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


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
        x = input_values.unsqueeze(1)
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
        return mel.reshape(len(wave), -1, self.width).to(input_values.dtype)


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


class ContextEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.prenet_depth))
        norm = config.modality != "text" or config.prenet_depth > 0
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if norm else None


class FixedPositions(nn.Module):
    def __init__(self, config):
        super().__init__()
        rows, columns = (side // config.patch_size for side in config.image_size)
        self.positions = nn.Parameter(torch.zeros(1, rows * columns, config.hidden_size), requires_grad=False)


class ModalityEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.extra_tokens = (
            nn.Parameter(torch.zeros(1, config.extra_tokens, width)) if config.extra_tokens else None
        )
        self.context_encoder = ContextEncoder(config)
        if config.modality == "image":
            self.local_encoder = PatchEmbed(config)
            self.fixed_positional_encoder = FixedPositions(config)
        elif config.modality == "text":
            self.local_encoder = TextEmbedding(config)
        else:
            spectra = config.log_mel is not None
            self.local_encoder = LogMelSpectra(config) if spectra else WaveformEncoder(config)
            features = self.local_encoder.width
            self.project_features = nn.Sequential(
                nn.Identity(), nn.LayerNorm(features), nn.Linear(features, width)
            )
            convolutions = [
                nn.Sequential(nn.Conv1d(width, width, config.position_kernel, groups=config.position_groups))
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
            x = self.project_features(x)
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
            bias = hidden if bias is None else bias + hidden
        return bias


def alibi_slopes(heads):
    """A geometric sequence, interleaved where `heads` is no power of two (Press et al., 2022)."""

    def powers(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start ** (i + 1) for i in range(n)]

    closest = 2 ** math.floor(math.log2(heads))
    return powers(closest) + (powers(2 * closest)[0::2][: heads - closest] if closest != heads else [])


class Data2Vec2PreTrainedModel(PreTrainedModel):
    config_class = Data2Vec2Config
    base_model_prefix = "data2vec2"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


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
        output_hidden_states=False,
        return_dict=True,
        **kwargs,
    ):
        name = {"image": "pixel_values", "audio": "input_values", "text": "input_ids"}[self.config.modality]
        source = {"pixel_values": pixel_values, "input_values": input_values, "input_ids": input_ids}[name]
        if source is None:
            raise ValueError(f"a model of {self.config.modality} needs {name}")
        encoder = self.modality_encoders[self.config.modality.upper()]
        x, bias = encoder(source, attention_mask)
        states = [x]
        for block in [*encoder.context_encoder.blocks, *self.blocks]:
            x = block(x, bias)
            states.append(x)
        hidden = tuple(states) if output_hidden_states else None
        if not return_dict:
            return (x, hidden) if output_hidden_states else (x,)
        return BaseModelOutput(last_hidden_state=x, hidden_states=hidden)


def mean_over_tokens(x, encoder, attention_mask):
    """[B,T,D] without extra tokens -> [B,D], padding left out."""
    real = encoder._frames(attention_mask, x.shape[1]) if attention_mask is not None else None
    if real is None:
        return x.mean(1)
    real = real.unsqueeze(2)
    return (x * real).sum(1) / real.sum(1).clamp(min=1)


class _Classifier(Data2Vec2PreTrainedModel):
    """LayerNorm of the mean over tokens, then a linear layer."""

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2Model(config)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _logits(self, attention_mask=None, **source):
        x = self.data2vec2(attention_mask=attention_mask, **source).last_hidden_state
        encoder = self.data2vec2.modality_encoders[self.config.modality.upper()]
        pooled = mean_over_tokens(x[:, self.config.extra_tokens :], encoder, attention_mask)
        return self.head(self.fc_norm(pooled))


def classification_loss(config, logits, labels):
    """Squared error for one output, cross-entropy otherwise; None without labels."""
    if labels is None:
        return None
    if config.num_labels == 1:
        return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
    return F.cross_entropy(logits, labels)


class Data2Vec2ForImageClassification(_Classifier):
    def forward(self, pixel_values=None, labels=None, return_dict=True, **kwargs):
        logits = self._logits(pixel_values=pixel_values)
        loss = classification_loss(self.config, logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits) if return_dict else (loss, logits)


class Data2Vec2ForAudioClassification(_Classifier):
    main_input_name = "input_values"

    def forward(self, input_values=None, attention_mask=None, labels=None, return_dict=True, **kwargs):
        logits = self._logits(input_values=input_values, attention_mask=attention_mask)
        loss = classification_loss(self.config, logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits) if return_dict else (loss, logits)


class Data2Vec2ForSequenceClassification(Data2Vec2PreTrainedModel):
    """The first token through a hidden layer with tanh."""

    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2Model(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=True, **kwargs):
        x = self.data2vec2(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.out_proj(torch.tanh(self.dense(x[:, self.config.extra_tokens])))
        loss = classification_loss(self.config, logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits) if return_dict else (loss, logits)


class Data2Vec2ForCTC(Data2Vec2PreTrainedModel):
    """A linear layer over frames; padded frames are blank (id 0)."""

    main_input_name = "input_values"

    def __init__(self, config):
        super().__init__(config)
        self.data2vec2 = Data2Vec2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_values=None, attention_mask=None, labels=None, return_dict=True, **kwargs):
        """labels: [B,L] token ids, negative where there is none."""
        x = self.data2vec2(input_values=input_values, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(x[:, self.config.extra_tokens :]).float()
        lengths = torch.full((len(logits),), logits.shape[1], device=logits.device)
        if attention_mask is not None:
            encoder = self.data2vec2.modality_encoders["AUDIO"]
            real = encoder._frames(attention_mask, logits.shape[1])
            blank = torch.full(logits.shape[2:], float("-inf"), device=logits.device)
            blank[0] = 0.0
            logits, lengths = torch.where(real.unsqueeze(2), logits, blank), real.sum(1)
        loss = None
        if labels is not None:
            log_probs = F.log_softmax(logits, 2).transpose(0, 1)
            wanted = labels >= 0
            loss = F.ctc_loss(log_probs, labels[wanted], lengths, wanted.sum(1), blank=0, zero_infinity=True)
        return CausalLMOutput(loss=loss, logits=logits) if return_dict else (loss, logits)
