"""Model FLOPs of one training step, by formula.

Two per multiply-add; backward is twice the forward; the teacher runs forward only.

What the algorithm needs, not what an implementation happens to compute: the decoder and its projection count
for all places of all masked versions as the original computes them, norms, GELU, softmax and the optimizer
count nothing.
"""

from __future__ import annotations

from .config import ImageFront, ModelConfig, TextFront, WaveformFront


def block_flops(cfg: ModelConfig, rows: int, tokens: int) -> int:
    """One transformer block over `rows` sequences of `tokens`, forward."""
    hidden = int(cfg.dim * cfg.mlp_ratio)
    projections = 2 * rows * tokens * cfg.dim * (4 * cfg.dim + 2 * hidden)
    return projections + 4 * rows * tokens * tokens * cfg.dim


def decoder_flops(cfg: ModelConfig, rows: int, tokens: int) -> int:
    """All convolutions and the projection at every place, forward."""
    dec = cfg.decoder
    kernel = dec.kernel**2 if isinstance(cfg.front, ImageFront) else dec.kernel
    widths = [cfg.dim] + [dec.dim] * dec.layers
    total = sum(2 * rows * tokens * width // dec.groups * dec.dim * kernel for width in widths[:-1])
    width = dec.dim
    for _ in range(dec.projection_layers - 1):
        hidden = int(dec.dim * dec.projection_ratio)
        total, width = total + 2 * rows * tokens * width * hidden, hidden
    return total + 2 * rows * tokens * width * cfg.dim


def step_flops(cfg: ModelConfig, shape: tuple[int, ...]) -> int:
    """One step on a source of `shape`: [B,C,H,W], [B,samples] or [B,T]."""
    front, batch = cfg.front, shape[0]
    rows = batch * cfg.mask.clones
    if isinstance(front, ImageFront):
        tokens = front.grid[0] * front.grid[1]
        kept = int(tokens * (1 - cfg.mask.prob))
        local = 2 * batch * tokens * front.patch**2 * front.channels * cfg.dim
        local_step, teacher_front = (
            2 * local,
            local,
        )  # pixels need no gradient; the teacher has its own patches
        per_version, per_sample = 0, 0
    elif isinstance(front, TextFront):
        tokens = shape[1]
        kept = int(tokens * (1 - cfg.mask.prob))
        local_step = teacher_front = per_version = per_sample = 0
    else:
        tokens = front.frames(shape[1])
        kept = tokens - int(tokens * cfg.mask.prob)
        local = 2 * batch * tokens * front.width * cfg.dim
        local_step = 3 * local
        if isinstance(front, WaveformFront):
            length, channels = shape[1], 1
            for i, (width, kernel, stride) in enumerate(front.conv_layers):
                length = (length - kernel) // stride + 1
                local_step += (2 if i == 0 else 3) * 2 * batch * length * width * channels * kernel
                channels = width
        layer = 2 * tokens * cfg.dim * cfg.dim // front.position_groups * front.position_kernel
        per_version, per_sample = rows * layer * front.position_layers, batch * layer * front.position_layers
        teacher_front = 0
    blocks = cfg.prenet_depth + cfg.depth
    seen = kept + front.extra_tokens
    student = blocks * block_flops(cfg, rows, seen) + decoder_flops(cfg, rows, tokens) + per_version
    teacher = blocks * block_flops(cfg, batch, tokens + front.extra_tokens) + per_sample + teacher_front
    return 3 * student + teacher + local_step


def spared_flops(cfg: ModelConfig, shape: tuple[int, ...]) -> int:
    """What `step_flops` counts at kept places of the decoder, where no loss reads the prediction.

    The model leaves the projection out there, and the last layer where it is a dense 1-D convolution.
    """
    _, kept = token_counts(cfg, shape)
    dec, widths = cfg.decoder, _projection(cfg)
    each = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
    if dec.groups == 1 and not isinstance(cfg.front, ImageFront):
        each += (cfg.dim if dec.layers == 1 else dec.dim) * dec.dim * dec.kernel
    return 3 * 2 * shape[0] * cfg.mask.clones * kept * each


def token_counts(cfg: ModelConfig, shape: tuple[int, ...]) -> tuple[int, int]:
    """Tokens of a sample and how many of them the student sees, as the mask samplers count."""
    front, prob = cfg.front, cfg.mask.prob
    if isinstance(front, ImageFront):
        tokens = front.grid[0] * front.grid[1]
        return tokens, int(tokens * (1 - prob))
    if isinstance(front, TextFront):
        return shape[1], int(shape[1] * (1 - prob))
    tokens = front.frames(shape[1])
    return tokens, tokens - int(tokens * prob)


def _projection(cfg: ModelConfig) -> list[int]:
    """Widths of the decoder's projection, from its convolutions to the model."""
    dec = cfg.decoder
    return [dec.dim, *[int(dec.dim * dec.projection_ratio)] * (dec.projection_layers - 1), cfg.dim]
