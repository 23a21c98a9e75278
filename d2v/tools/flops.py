"""FLOPs of one training step by formula, of every objective: two per multiply-add.

Matrix products, convolutions and attention count; norms, GELU, softmax, the optimizer and the fixed spectra
of log-mel features count nothing, nor does what an implementation makes anew in backward. Backward is twice
the forward, once where the input needs no gradient (pixels, the waveform), and nothing in the teacher.

`step_work` is what a step has to compute: predictions where the loss reads them. `step_flops` counts data2vec
2.0 as the original computes it, whose decoder predicts kept places too: what steps are compared by.

torch's FlopCounterMode is no measure of a step: it counts the weight gradient of a convolution with G groups
G times (torch 2.13), and on a CPU nothing of scaled_dot_product_attention, of oneDNN's fused products, of
dot and mv.
"""

from __future__ import annotations

from typing import NamedTuple

from ..config.fronts import ImageFront, LogMelFront, TextFront, WaveformFront, token_count
from ..config.model import ModelConfig


class Work(NamedTuple):
    """FLOPs of a step."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def plus(self, *others: Work) -> Work:
        """The sum of all."""
        forwards, backwards = zip(self, *others, strict=True)
        return Work(sum(forwards), sum(backwards))


def block_flops(dim: int, mlp_ratio: float, rows: int, tokens: int) -> int:
    """One transformer block over `rows` sequences of `tokens`, forward."""
    projections = 2 * rows * tokens * dim * (4 * dim + 2 * int(dim * mlp_ratio))
    return projections + 4 * rows * tokens * tokens * dim


def step_flops(cfg: ModelConfig, shape: tuple[int, ...]) -> int:
    """One step on a source of `shape`: [B,C,H,W], [B,samples] or [B,T]; data2vec 2.0 as the original does.

    The original's decoder computes kept places, too, where no loss reads the prediction: the model leaves the
    projection out there, and the last layer where it is a dense 1-D convolution.
    """
    work = step_work(cfg, shape).total
    if cfg.objective != "data2vec2":
        return work
    rows, (tokens, kept) = shape[0] * cfg.mask.clones, token_counts(cfg, shape)
    whole, masked = (decoder_flops(cfg, rows, tokens, places) for places in (tokens, tokens - kept))
    return work + 3 * (whole - masked)


def step_work(cfg: ModelConfig, shape: tuple[int, ...]) -> Work:
    """One step of `cfg.objective` on a source of `shape`: [B,C,H,W], [B,samples] or [B,T]."""
    batch, (tokens, kept) = shape[0], token_counts(cfg, shape)
    rows, extra = batch * cfg.mask.clones, cfg.front.extra_tokens
    seen = kept if cfg.objective in ("data2vec2", "mae") else tokens
    encoder = _trained(_encoder_flops(cfg, rows, seen + extra, tokens))
    work = _local_work(cfg, shape).plus(encoder)
    masked = rows * (tokens - kept)
    if cfg.objective in ("data2vec2", "data2vec1"):
        teacher = _encoder_flops(cfg, batch, tokens + extra, tokens)
        if isinstance(cfg.front, ImageFront):  # has patches of its own
            teacher += _local_work(cfg, shape).forward
        work = work.plus(Work(forward=teacher))
    if cfg.objective == "data2vec2":
        return work.plus(_trained(decoder_flops(cfg, rows, tokens, tokens - kept)))
    if cfg.objective == "data2vec1":
        return work.plus(_trained(2 * masked * cfg.dim * cfg.dim))
    if cfg.objective == "mlm":
        assert isinstance(cfg.front, TextFront)
        return work.plus(_trained(2 * masked * cfg.dim * (cfg.dim + cfg.front.vocab_size)))
    dec, front = cfg.mae, cfg.front
    assert isinstance(front, (ImageFront, LogMelFront))
    width = front.patch_size if isinstance(front, ImageFront) else front.width
    decoder = 2 * rows * (kept + extra) * cfg.dim * dec.dim + 2 * masked * dec.dim * width
    decoder += dec.depth * block_flops(dec.dim, cfg.mlp_ratio, rows, tokens + extra)
    return work.plus(_trained(decoder))


def supervised_work(cfg: ModelConfig, shape: tuple[int, ...], classes: int, *, per_token: bool) -> Work:
    """One step of the encoder and a linear head for `classes`, on a source as `step_work` takes it.

    per_token: labels are of tokens, not of samples.
    """
    batch, tokens = shape[0], token_count(cfg.front, shape)
    encoder = _encoder_flops(cfg, batch, tokens + cfg.front.extra_tokens, tokens)
    head = 2 * batch * (tokens if per_token else 1) * cfg.dim * classes
    return _local_work(cfg, shape).plus(_trained(encoder + head))


def token_counts(cfg: ModelConfig, shape: tuple[int, ...]) -> tuple[int, int]:
    """Tokens of a sample and how many of them are not masked, as the mask samplers count."""
    tokens, prob = token_count(cfg.front, shape), cfg.mask.prob
    if cfg.mask_kind == "span":
        return tokens, tokens - int(tokens * prob)
    if cfg.mask_kind == "block":  # the inverse of blocks that stay visible
        return tokens, tokens - int(tokens * (1 - (1 - prob)))
    return tokens, int(tokens * (1 - prob))


def _trained(forward: int) -> Work:
    return Work(forward, 2 * forward)


def _encoder_flops(cfg: ModelConfig, rows: int, seen: int, tokens: int) -> int:
    """Convolutional positions over all `tokens` of a row, and all blocks over those `seen`; forward."""
    flops = (cfg.prenet_depth + cfg.depth) * block_flops(cfg.dim, cfg.mlp_ratio, rows, seen)
    if isinstance(cfg.front, (WaveformFront, LogMelFront)):
        weights = cfg.dim * cfg.dim // cfg.front.position_groups * cfg.front.position_kernel
        flops += cfg.front.position_layers * 2 * rows * tokens * weights
    return flops


def decoder_flops(cfg: ModelConfig, rows: int, tokens: int, predicted: int) -> int:
    """The convolutional decoder over `tokens` of a row, its projection at `predicted` of them, forward; so is
    the last convolution where it is dense and 1-D."""
    dec, image = cfg.decoder, isinstance(cfg.front, ImageFront)
    kernel = dec.kernel**2 if image else dec.kernel
    flops, width = 0, cfg.dim
    for layer in range(dec.layers):
        last = layer == dec.layers - 1 and dec.groups == 1 and not image
        flops += 2 * rows * (predicted if last else tokens) * (width // dec.groups) * dec.dim * kernel
        width = dec.dim
    widths = [width, *[int(dec.dim * dec.projection_ratio)] * (dec.projection_layers - 1), cfg.dim]
    return flops + sum(2 * rows * predicted * a * b for a, b in zip(widths, widths[1:], strict=False))


def _local_work(cfg: ModelConfig, shape: tuple[int, ...]) -> Work:
    """Local features of each sample."""
    front, batch = cfg.front, shape[0]
    if isinstance(front, TextFront):
        return Work()
    tokens = token_count(front, shape)
    if isinstance(front, ImageFront):
        patches = 2 * batch * tokens * front.patch_size * cfg.dim
        return Work(patches, patches)
    work = _trained(2 * batch * tokens * front.width * cfg.dim)
    if isinstance(front, WaveformFront):
        length, channels = shape[1], 1
        for number, (width, kernel, stride) in enumerate(front.conv_layers):
            length = (length - kernel) // stride + 1
            flops = 2 * batch * length * width * channels * kernel
            work = work.plus(Work(flops, flops if number == 0 else 2 * flops))
            channels = width
    return work
