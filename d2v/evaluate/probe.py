"""How much frozen features know: `d2v probe`, a linear classifier and nearest neighbours.

Both read features standardised on the training part. Samples are represented by the mean over their
tokens; where labels belong to tokens (phones), every labelled token is a row of its own. The raw input is
probed alike: what the encoder must beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config.fronts import TextFront
from ..config.run import Config
from ..data.open import open_labelled
from ..data.types import DataError, Labelled, Split, unused
from ..formats.open import open_encoder
from ..model import Pretraining
from ..model.finite import check_finite
from ..model.huggingface import Encoder
from ..model.pool import mean_over_tokens
from ..model.pretraining import Weights
from ..train.backends import check_backends, use_backends_of
from .features import BATCH, Layer, token_features

Kind = Literal["linear", "knn"]

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""of the neighbours' votes, as in DINO (Caron et al., 2021, eval_knn.py)"""
KNN_ROWS = 20_000
"""largest number of training rows that neighbours are searched among: evenly spaced ones of more"""
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""on the linear probe's weights: one is chosen on a held-out fifth of the training rows"""
ITERATIONS = 100
"""of L-BFGS; accuracy has settled by then, converged or not"""
TOKEN_ROWS = 20_000
"""largest number of training tokens, evenly spaced ones of more: neighbouring tokens are nearly copies"""
BLOCK = 100
"""labelled tokens held out together: neighbouring ones belong to the same sample"""

Rows = tuple[np.ndarray, np.ndarray]
"""features [n,f] float32 and labels [n] int64"""


def features_of(model: Encoder, split: Split, *, layer: Layer = -1, weights: Weights = "student") -> Rows:
    """One row per sample, or per labelled token, of a split; see `d2v.evaluate.features.token_features`.

    Raises NotFinite when they are NaN or infinite.
    """
    device, extra = next(model.parameters()).device, model.cfg.front.extra_tokens
    was_training = model.training
    model.eval()
    features: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for source, padding, label in split.batches(BATCH[model.modality]):
            padding = None if padding is None else padding.to(device)
            x, padded = token_features(model, source.to(device), padding, layer=layer, weights=weights)
            x = x[:, extra:]
            if label.ndim == 1:
                rows = mean_over_tokens(x, padded).cpu()
            else:
                rows, label = x.cpu()[label >= 0], label[label >= 0]
            done = sum(map(len, labels))
            check_finite("probe", "features", [(f"rows {done} to {done + len(rows)}", rows.numpy())], model)
            features.append(rows)
            labels.append(label)
    finally:
        model.train(was_training)
    if not features:
        raise DataError("probe: a part of the data set has no readable sample")
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def probe_model(
    model: Encoder,
    labelled: Labelled,
    *,
    layer: Layer = -1,
    weights: Weights = "student",
    kinds: Sequence[Kind] = ("linear", "knn"),
) -> dict[str, Any]:
    """Accuracy on each test split: {"linear": {split: share right}, "knn": {..}, "layer", "weights",
    "n_train", "n_test": {split: rows}}."""
    rows = {
        name: features_of(model, split, layer=layer, weights=weights)
        for name, split in labelled.splits.items()
    }
    return {**probe_rows(rows, labelled.level, kinds), "layer": layer, "weights": weights}


def probe_raw(labelled: Labelled, kinds: Sequence[Kind] = ("linear", "knn")) -> dict[str, Any]:
    """As `probe_model`, on the raw input; "majority" is the share of the most frequent training class."""
    rows = {name: split.raw() for name, split in labelled.splits.items()}
    frequent = np.bincount(rows["train"][1]).argmax()
    guess = {name: float((y == frequent).mean()) for name, (_, y) in rows.items() if name != "train"}
    return {**probe_rows(rows, labelled.level, kinds), "majority": guess}


def probe_rows(
    rows: dict[str, Rows], level: Literal["sample", "token"], kinds: Sequence[Kind]
) -> dict[str, Any]:
    """Fit on rows["train"], score on every other part.

    DataError for fewer than two training classes, NotFinite for rows that are NaN or infinite.
    """
    check_finite("probe", "values", [(f"part {name}", values) for name, (values, _) in rows.items()])
    x, y = rows["train"] if level == "sample" else _evenly(rows["train"], TOKEN_ROWS)
    if len(np.unique(y)) < 2:
        raise DataError(f"probe: at least 2 classes are needed in the training part, got {len(np.unique(y))}")
    mean, deviation = x.mean(0), x.std(0)
    scale = 1 / np.where(deviation > 1e-6, deviation, 1.0)
    scaled = {
        name: (((features - mean) * scale).astype(np.float32), labels)
        for name, (features, labels) in {**rows, "train": (x, y)}.items()
    }
    train = scaled.pop("train")
    found: dict[str, Any] = {}
    for kind in kinds:
        if kind == "linear":
            found[kind] = _linear(train, scaled, BLOCK if level == "token" else 1)
        else:
            found[kind] = {name: _knn(train, part) for name, part in scaled.items()}
    return {**found, "n_train": len(y), "n_test": {name: len(label) for name, (_, label) in scaled.items()}}


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """[k] int64: at most `most` of the numbers below `count`, ascending, first and last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _evenly(rows: Rows, most: int) -> Rows:
    """At most `most` rows, evenly spaced."""
    keep = evenly_spaced(len(rows[1]), most)
    return rows[0][keep], rows[1][keep]


def _linear(train: Rows, tests: dict[str, Rows], block: int) -> dict[str, float]:
    """Multinomial logistic regression; the penalty is chosen on blocks of held-out training rows."""
    x, y = (torch.from_numpy(part) for part in train)
    classes = 1 + max(int(part.max()) for part in (train[1], *(labels for _, labels in tests.values())))
    blocks = np.arange(len(y)) // block
    order = np.random.Generator(np.random.PCG64(0)).permutation(blocks[-1] + 1)
    held = torch.from_numpy(np.isin(blocks, order[: max(1, len(order) // 5)]))
    best = PENALTIES[0]
    if len(y[~held].unique()) > 1:
        weights, scores = torch.zeros(x.shape[1] + 1, classes), []
        for penalty in PENALTIES:  # from strong to weak, each from the last one's solution
            weights = _fit(x[~held], y[~held], penalty, weights)
            scores.append(_accuracy(weights, x[held], y[held]))
        best = PENALTIES[int(np.argmax(scores))]
    weights = _fit(x, y, best, torch.zeros(x.shape[1] + 1, classes))
    return {
        name: _accuracy(weights, torch.from_numpy(features), torch.from_numpy(labels))
        for name, (features, labels) in tests.items()
    }


def _fit(x: Tensor, y: Tensor, penalty: float, start: Tensor) -> Tensor:
    """Weights [f+1,classes], the last row the biases: mean cross entropy + penalty / 2 * |weights|^2."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = torch.addmm(weights[-1], x, weights[:-1])
        value = torch.nn.functional.cross_entropy(logits, y) + penalty / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def _accuracy(weights: Tensor, x: Tensor, y: Tensor) -> float:
    predicted = torch.addmm(weights[-1], x, weights[:-1]).argmax(1)
    return float((predicted == y).double().mean())


def _knn(train: Rows, test: Rows) -> float:
    """Cosine neighbours, each voting with exp(similarity / TEMPERATURE)."""
    known, known_labels = (torch.from_numpy(part) for part in _evenly(train, KNN_ROWS))
    queries, labels = (torch.from_numpy(part) for part in test)
    known, queries = (torch.nn.functional.normalize(x, dim=1) for x in (known, queries))
    classes = int(max(known_labels.max(), labels.max())) + 1
    right = 0
    for i in range(0, len(queries), 1_000):
        similarity, place = (queries[i : i + 1_000] @ known.T).topk(min(NEIGHBOURS, len(known)))
        votes = torch.zeros(len(similarity), classes)
        votes.scatter_add_(1, known_labels[place], (similarity / TEMPERATURE).exp())
        right += int((votes.argmax(1) == labels[i : i + 1_000]).sum())
    return right / len(queries)


def run_probe(
    path: str | Path,
    data: str,
    *,
    layer: Layer = -1,
    weights: Weights = "student",
    kinds: Sequence[Kind] = ("linear", "knn"),
    backend: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """Probe a run, a checkpoint folder, an original `.pt` or `hf:FOLDER`; print and return its numbers.

    The result of `probe_model`, with "raw" holding that of `probe_raw`. backend: as in D2VKERN_BACKEND;
    none: that of the run. text_column (of texts), label_column: see `DataConfig`; none: the run's. Raises
    DataError (labels missing, one class), ValueError (no such layer, no tokenizer, features that are NaN
    or infinite), CheckpointError.
    """
    check_backends(backend)
    model, cfg, folder = open_encoder(path)
    if text_column is not None and cfg.model.modality != "text":
        raise ValueError(f"d2v probe: --data.text-column has no effect for {cfg.model.modality}")
    text, label = text_column or cfg.data.text_column, label_column or cfg.data.label_column
    cfg = replace(cfg, data=replace(cfg.data, text_column=text, label_column=label))
    labelled = _labelled(model, data, cfg, folder)
    with use_backends_of(cfg.train.backend, backend):
        found = {**probe_model(model, labelled, layer=layer, weights=weights, kinds=kinds), "path": str(path)}
    found["raw"] = probe_raw(labelled, kinds)
    print("\n".join((*_table(found, kinds), *unused(labelled.splits.values()))))
    return found


def _labelled(model: Encoder, data: str, cfg: Config, folder: Path | None) -> Labelled:
    """The labelled data of an encoder; texts in the tokens of a model of transformers."""
    if not isinstance(model, Pretraining) and isinstance(cfg.model.front, TextFront):
        from ..formats.hf_import import open_hf_texts

        return open_hf_texts(str(folder), data, cfg)
    return open_labelled(data, cfg, run_dir=folder)


def _table(found: dict[str, Any], kinds: Sequence[Kind]) -> list[str]:
    """One line per classifier and input, one column per test split, in percent."""
    splits = list(found["n_test"])
    lines = [
        f"{found['path']}: {found['weights']}, layer {found['layer']}, {found['n_train']:,} training rows",
        f"{'accuracy, %':<24}" + "".join(f"{name:>16}" for name in splits),
    ]
    rows = {f"{kind}, {name}": source[kind] for kind in kinds for name, source in
            (("features", found), ("raw input", found["raw"]))}  # fmt: skip
    for name, scores in {**rows, "most frequent class": found["raw"]["majority"]}.items():
        lines.append(f"{name:<24}" + "".join(f"{100 * scores[split]:>16.1f}" for split in splits))
    return lines
