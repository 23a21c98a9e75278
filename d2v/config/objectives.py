"""A preset under another objective: the rival's own masks, loss and decoder, everything else as it is.

Encoder, data, optimizer, schedules and the teacher's decay stay the preset's, so that runs differ in what is
learned alone. A rival has one view of each sample, so its batch is the preset's times the M views of data2vec
2.0: as many views a step, and at the base presets about what the rivals' papers used (4,096 images in MAE, an
hour of speech in data2vec 1). Other values are the papers' too: data2vec 1 (Baevski et al., 2022a, section
4), MAE (He et al., 2022, section 3 and appendix A), Audio-MAE (Huang et al., 2022, section 4), RoBERTa (Liu
et al., 2019, section 2).
"""

from __future__ import annotations

from dataclasses import replace

from .fronts import Front, ImageFront, TextFront
from .model import MAEConfig, MaskConfig, ModelConfig, Objective, TargetConfig
from .run import Config


def for_objective(cfg: Config, objective: Objective) -> Config:
    """The run with `objective`. ValueError for an objective that its front end cannot have."""
    model = _MODELS[objective](cfg.model)
    batch = cfg.data.batch * cfg.model.mask.clones // model.mask.clones
    return replace(cfg, model=model, data=replace(cfg.data, batch=batch))


def _data2vec1(model: ModelConfig) -> ModelConfig:
    """One view, masked tokens through the encoder.

    Images: 60% in blocks, K = 6, beta 2. Speech: spans of 10 frames that cover about 49%, K = 8, squared
    error. Text: 15%, K = 10, beta 4. Layers are normalised over time for speech, over channels otherwise.
    """
    front = model.front
    if isinstance(front, ImageFront):
        mask = MaskConfig(kind="block", prob=0.6, length=_block(front), adjust=0.0, clones=1)
        target, beta = TargetConfig(top_k=6, norm="layer"), 2.0
    elif isinstance(front, TextFront):
        mask = MaskConfig(kind="random", prob=0.15, length=1, adjust=0.0, clones=1)
        target, beta = TargetConfig(top_k=10, norm="layer"), 4.0
    else:
        mask = MaskConfig(kind="span", prob=0.49, length=10, adjust=0.05, clones=1)
        target, beta = TargetConfig(top_k=8, norm="instance"), 0.0
    target = replace(target, top_k=min(target.top_k, model.target.top_k))
    return replace(
        model, objective="data2vec1", mask=mask, target=target, loss_beta=beta, loss_scale=None, cls_loss=0.0
    )


def _mae(model: ModelConfig) -> ModelConfig:
    """75% of patches (80% of spectra), each by itself; a decoder of two thirds of the width and depth."""
    prob = 0.75 if isinstance(model.front, ImageFront) else 0.8
    heads = model.heads
    width = max(1, round(model.dim * 2 / 3 / (4 * heads))) * 4 * heads
    depth = max(1, round((model.prenet_depth + model.depth) * 2 / 3))
    mask = MaskConfig(kind="random", prob=prob, length=1, adjust=0.0, clones=1)
    decoder = MAEConfig(dim=width, heads=heads, depth=depth)
    return replace(model, objective="mae", mask=mask, mae=decoder, cls_loss=0.0, ema_encoder_only=False)


def _mlm(model: ModelConfig) -> ModelConfig:
    """15% of tokens."""
    mask = MaskConfig(kind="random", prob=0.15, length=1, adjust=0.0, clones=1)
    return replace(model, objective="mlm", mask=mask, cls_loss=0.0)


def _data2vec2(model: ModelConfig) -> ModelConfig:
    return replace(model, objective="data2vec2")


def _block(front: Front) -> int:
    """Side of a masked square: 4, BEiT's least block of 16 patches, on grids that have room for it."""
    assert isinstance(front, ImageFront)
    return min(4, max(1, min(front.grid) // 3))


_MODELS = {"data2vec2": _data2vec2, "data2vec1": _data2vec1, "mae": _mae, "mlm": _mlm}
