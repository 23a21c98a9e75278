"""Frozen features: opening a model with the data settings it was trained with, and `d2v extract`.

A layer is the output of one main block, so the last one is the encoder's output and what fine-tuning starts
from (targets are made of something else: FFN outputs, before residual and norm). "mean" is the average over
all blocks, "all" puts them side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Union

import numpy as np
import torch
from torch import Tensor, nn

from . import load
from .atomic import replacing
from .backends import check_backends, use_backends_of
from .checkpoint import find_run, read_config
from .config import Config, DataConfig, TextFront
from .convert import is_folder
from .data import open_data
from .model import Pretraining
from .normalisation import as_recorded
from .train import pick_device

if TYPE_CHECKING:
    from .hf.encoder import HuggingFaceEncoder

Encoder = Union[Pretraining, "HuggingFaceEncoder"]
"""what features are taken from"""
Layer = int | Literal["mean", "all"]
Weights = Literal["student", "teacher"]

PREFIX = "hf:"
"""before the folder of a model of transformers"""
BATCH = {"image": 64, "audio": 1, "text": 32}
"""samples of a forward pass; utterances go alone, as padding reaches the features of speech"""


class NotFinite(ValueError):
    """Features, or a head's outputs, that are NaN or infinite: nothing can be read from them."""


def check_finite(
    op: str, what: str, rows: Iterable[tuple[str, np.ndarray]], model: nn.Module | None = None
) -> None:
    """Raise NotFinite unless all rows (name, values) are finite, with weights of the model that are not."""
    for name, values in rows:
        if np.isfinite(values).all():
            continue
        broken = [] if model is None else [k for k, x in model.state_dict().items() if not x.isfinite().all()]
        cause = f", as are values of {broken[0]} in the model" if broken else ""
        raise NotFinite(f"{op}: {what} of {name} are NaN or infinite{cause}")


def open_encoder(path: str | Path) -> tuple[Encoder, Config, Path | None]:
    """As `open_model`, and `hf:FOLDER` opens a model of transformers, or what `d2v convert --to hf` wrote."""
    if not str(path).startswith(PREFIX):
        return open_model(path)
    from .hf.encoder import open_hf
    from .hf.folder import is_ours

    folder = str(path).removeprefix(PREFIX)
    return open_model(folder) if is_ours(folder) else open_hf(folder, pick_device("auto"))


def open_model(path: str | Path) -> tuple[Pretraining, Config, Path | None]:
    """A model, its config and the folder of its tokenizer, from a run, a checkpoint folder or a `.pt` file.

    Pictures and waves are normalised as they were in training, where that is known. An original text model
    needs `tokenizer.json` beside its file. Raises CheckpointError, and ValueError for the missing tokenizer.
    """
    if str(path).startswith(PREFIX):
        raise ValueError(f"{path}: one of our models is needed, not one of transformers")
    path = Path(path)
    model = load(path, device=pick_device("auto"))
    if not isinstance(model, Pretraining):
        raise ValueError(
            f"{path} is fine-tuned: a pretrained model is needed (`d2v eval` scores fine-tuned ones)"
        )
    if path.is_dir() and not is_folder(path):
        run = find_run(path)[0]
        cfg, _ = read_config(run)
        return model, as_recorded(cfg, run), run
    front, data, home = model.cfg.front, DataConfig(), path if path.is_dir() else path.parent
    if isinstance(front, TextFront):
        if not (home / "tokenizer.json").is_file():
            raise ValueError(f"{path}: tokenizer.json must lie beside a text model of the original")
        data = dataclasses.replace(data, block=min(data.block, front.max_positions))
    return model, as_recorded(Config(preset=path.stem, model=model.cfg, data=data), path), home


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


def mean_over_tokens(x: Tensor, padding: Tensor | None) -> Tensor:
    """[B,T,D] to [B,D], padding left out."""
    if padding is None:
        return x.mean(1)
    real = (~padding).unsqueeze(-1)
    return (x * real).sum(1) / real.sum(1).clamp(min=1)


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
