"""Frozen features of whole samples, and `d2v extract`.

A layer is the output of one main block, so the last one is the encoder's output and what fine-tuning starts
from (targets are made of something else: FFN outputs, before residual and norm). "mean" is the average over
all blocks, "all" puts them side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..config.atomic import replacing
from ..config.fronts import TextFront
from ..data.open import open_data
from ..formats.open import open_encoder
from ..model import Pretraining
from ..model.finite import check_finite
from ..model.huggingface import Encoder
from ..model.pool import mean_over_tokens
from ..model.pretraining import Weights
from ..train.backends import check_backends, use_backends_of

Layer = int | Literal["mean", "all"]

BATCH = {"image": 64, "audio": 1, "text": 32}
"""samples of a forward pass; utterances go alone, as padding reaches the features of speech"""


@torch.no_grad()
def token_features(
    model: Encoder, source: Tensor, padding_mask: Tensor | None, *, layer: Layer, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """Features [B,E+T,D] fp32 of whole samples, extra tokens first, and the padding [B,T] (True) or None.

    Of speech, our models see the padding of a batch (see `Pretraining.features`): give an utterance alone.
    layer: index of a main block, negative from the last, "mean", or "all" ([B,E+T,depth*D]). ValueError when
        there is no such block, or no teacher.
    """
    depth = model.cfg.depth
    if not isinstance(layer, str) and not -depth <= layer < depth:
        raise ValueError(f"features: layer must be in {-depth}..{depth - 1}, mean or all, got {layer}")
    outputs, padding = model.outputs(source, padding_mask, teacher=weights == "teacher")
    if layer == "mean":
        return torch.stack(outputs).mean(0).float(), padding
    chosen = torch.cat(outputs, dim=-1) if layer == "all" else outputs[layer]
    return chosen.float(), padding


def run_extract(
    path: str | Path,
    data: str,
    out: str | Path,
    *,
    layer: Layer = -1,
    pool: Literal["mean", "cls", "none"] = "mean",
    weights: Weights = "student",
    backend: str | None = None,
) -> Path:
    """Features of every readable sample of `data`, in its order, to the file `out` (.npz), atomically.

    Keys: `features` [n,D] float32, or with pool "none" the tokens of all samples [sum of lengths, D] with
    `lengths` [n] int64; `ids` [n] int64; `names` [n]. Of an embedded data set the held-out part is taken.
    pool: mean over tokens; the CLS token (of our models the last extra one); none. Text counts <s> and </s>
    as tokens. backend: as in D2VKERN_BACKEND; none: that of the run.
    Raises ValueError (DataError; NotFinite for features that are NaN or infinite), CheckpointError, OSError.
    """
    check_backends(backend)
    model, cfg, folder = open_encoder(path)
    if not isinstance(model, Pretraining) and isinstance(cfg.model.front, TextFront):
        raise ValueError(f"extract: {path}: of text, models of transformers can be probed alone")
    extra, out = model.cfg.front.extra_tokens, Path(out)
    if pool == "cls" and not extra:
        raise ValueError(f"extract: pool must be mean or none for a model without CLS token, got {pool!r}")
    cls = extra - 1 if isinstance(model, Pretraining) else 0  # registers and the like come after it
    device = next(model.parameters()).device
    pipeline = open_data(data, cfg, device=device, purpose="eval", run_dir=folder)
    columns: dict[str, list[np.ndarray]] = {"features": [], "ids": [], "names": []}
    if pool == "none":
        columns["lengths"] = []
    for names, batch in pipeline.in_order(BATCH[model.modality]):
        with use_backends_of(cfg.train.backend, backend):
            x, padding = token_features(model, batch.source, batch.padding_mask, layer=layer, weights=weights)
        tokens = x[:, extra:]
        if pool == "none":
            rows = list(_unpadded(tokens, padding))
            columns["lengths"].append(np.array([len(row) for row in rows]))
        else:
            pooled = x[:, cls] if pool == "cls" else mean_over_tokens(tokens, padding)
            rows = list(pooled.cpu().numpy()[:, None])
        check_finite("extract", "features", zip(names, rows, strict=True), model)
        columns["features"] += rows
        columns["ids"].append(batch.ids.cpu().numpy())
        columns["names"].append(np.array(names))
    if not columns["ids"]:
        raise ValueError(f"extract: {data} has no readable sample")
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    with replacing(out) as file:
        np.savez(file, allow_pickle=False, **arrays)
    shape = " x ".join(f"{size:,}" for size in arrays["features"].shape)
    print(f"{out}: {len(arrays['ids']):,} samples, features {shape}")
    for name, reason in pipeline.report.unreadable.items():
        print(f"  unreadable {name}: {reason}")
    return out


def _unpadded(tokens: Tensor, padding: Tensor | None) -> Iterator[np.ndarray]:
    """The real tokens of each sample, [t,D]."""
    for i, row in enumerate(tokens):
        yield (row if padding is None else row[~padding[i]]).cpu().numpy()
