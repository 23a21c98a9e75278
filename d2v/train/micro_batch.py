"""From the global batch of the config to micro-batches that fit in memory.

The maths of a run depends on `data.batch` only (up to rounding): gradients of the micro-batches are
summed before the step. What fits is estimated, not tried, so that a run starts at once.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..config.fronts import Front, LogMelFront, TextFront, WaveformFront, token_count
from ..config.model import ModelConfig
from ..config.run import Config
from ..data.types import Batch

SHARE = 0.6
"""share of the free memory that activations may take; the rest is for what the estimate leaves out"""

UNITS = {"image": "images", "audio": "seconds", "text": "blocks"}
"""what `data.batch` counts"""


def amount(front: Front, batch: Batch) -> float:
    """Samples of a batch in the unit of `data.batch`: for audio, seconds without padding."""
    if not isinstance(front, (WaveformFront, LogMelFront)):
        return len(batch)
    samples = batch.source.numel() if batch.lengths is None else sum(batch.lengths)
    return samples / front.sample_rate


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: the GPU's own count, or MemAvailable of /proc/meminfo.

    Where neither is known (macOS), 4 GiB are assumed.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 << 30


def activation_bytes(cfg: Config) -> int:
    """Estimated activations kept for backward, per unit of `data.batch` (image, second of audio, block).

    With M masks, T tokens per unit, K kept, widths D (model) and C (decoder), values kept per token:

        student block      M * K * D * (8 + 2 * mlp_ratio)   qkv, attention, two norms, MLP around GELU
        attention          M * K * K * heads * 2             logits and probabilities; fused ones keep none
        decoder layer      M * T * C * 4                     conv, norm, GELU, sum
        projection         M * T * D * 4
        speech conv layer  frames * channels * 3             conv, norm, GELU
        positional layer   M * T * D * 4                     speech only
        targets            T * D * 4                         the teacher keeps no activations

    times 4 bytes (2 for bf16). Where masked tokens go through the encoder K is T; mae has blocks of its
    decoder's width, mlm the logits of the vocabulary in place of the convolutions. Tensors that autograd kept
    in eager fp32, against this estimate, for data2vec2: image_base 508 of 650 MiB an image, audio_base 162 of
    297 a second, text_base 478 of 412 a block of 128.
    """
    m = cfg.model
    quadratic = token_count(m.front, (1, *cfg.sample_shape))
    tokens = quadratic / cfg.sample_units
    seen = 1.0 if m.objective in ("data2vec1", "mlm") else 1 - m.mask.prob
    kept = tokens * seen + m.front.extra_tokens
    longest = quadratic * seen + m.front.extra_tokens
    clones, depth = m.mask.clones, m.prenet_depth + m.depth
    values = clones * kept * m.dim * (8 + 2 * m.mlp_ratio) * depth
    values += clones * kept * longest * m.heads * 2 * depth
    if m.objective == "data2vec2":
        values += clones * tokens * (m.decoder.dim * 4 * m.decoder.layers + m.dim * 4)
    elif m.objective == "mae":
        per_token = m.mae.dim * (8 + 2 * m.mlp_ratio) + m.mae.heads * quadratic * 2
        values += clones * tokens * per_token * m.mae.depth
    elif isinstance(m.front, TextFront) and m.objective == "mlm":
        values += clones * tokens * m.mask.prob * m.front.vocab_size * 3
    values += tokens * m.dim * 4 + _front_values(m, tokens)
    return math.ceil(values * (2 if cfg.train.precision == "bf16" else 4))


def _front_values(m: ModelConfig, tokens: float) -> float:
    front = m.front
    if not isinstance(front, (WaveformFront, LogMelFront)):
        return 0.0
    values = m.mask.clones * tokens * m.dim * 4 * front.position_layers
    if isinstance(front, WaveformFront):
        frames = float(front.sample_rate)
        for channels, _, stride in front.conv_layers:
            frames /= stride
            values += 3 * frames * channels
    return values


def micro_batch(cfg: Config, device: torch.device, parameters: int) -> int:
    """Units per forward: `train.micro_batch`, else as many as fit, in equal shares of the batch.

    parameters: trained ones; their gradients and the two Adam moments (12 bytes each) come first.
    """
    batch = cfg.data.batch
    if cfg.train.micro_batch is not None:
        return min(cfg.train.micro_batch, batch)
    room = SHARE * (free_bytes(device) - 12 * parameters)
    fits = min(batch, max(1, int(room // activation_bytes(cfg))))
    fits = min(batch, max(fits, math.ceil(cfg.sample_units)))  # at least one utterance of full length
    return math.ceil(batch / math.ceil(batch / fits))


def equation(cfg: Config, micro: int) -> str:
    """`batch 32 images = 1 process x 1 micro-batch of 32`."""
    count = math.ceil(cfg.data.batch / micro)
    unit = UNITS[cfg.model.modality]
    last = cfg.data.batch - (count - 1) * micro
    parts = f"{count} micro-batch{'es' if count > 1 else ''} of {'' if last == micro else 'at most '}{micro}"
    return f"batch {cfg.data.batch} {unit} = 1 process x {parts}"
