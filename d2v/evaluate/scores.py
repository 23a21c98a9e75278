"""Scores of a fine-tuned model on held-out parts, while training and for `d2v eval`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.fronts import ImageFront
from ..config.toml import SETTINGS
from ..config.tune import FineTuneConfig
from ..data.normalisation import Normalisation, normalised
from ..data.speech.transcripts import SpokenPart, Vocabulary
from ..data.tune import Part, open_to_score, open_tune_data
from ..data.types import DataError, unused
from ..formats.open import load_run
from ..model.finite import check_finite
from ..model.tuned import FineTuned
from ..train.backends import check_backends, use_backends, use_backends_of
from ..train.checkpoint import LABELS, find_run
from ..train.process import pick_device
from .ctc import beam_search, greedy
from .features import BATCH
from .language_model import BONUS, WEIGHT, LanguageModel


@torch.no_grad()
def evaluate(
    model: FineTuned,
    cfg: FineTuneConfig,
    parts: Mapping[str, Part],
    names: Sequence[str],
    beam: int = 0,
    words: LanguageModel | None = None,
) -> dict[str, float]:
    """{"part/metric": score}, the deciding metric of a part first.

    classify: top1, top5. ctc: wer, cer; beam: width of the beam search, 0 takes the best path; words: its
    language model. sentence: GLUE's metrics of cfg.glue, else accuracy, or pearson, spearman and mse for
    regression.
    The model runs on the backends of cfg.train and is left in the mode it had. Raises DataError when no
    sample of a part can be read, NotFinite when the model's outputs are NaN or infinite.
    """
    was_training = model.training
    model.eval()
    try:
        with use_backends(cfg.train.backend):
            return {
                f"{part}/{name}": score
                for part, split in parts.items()
                for name, score in _part_scores(model, cfg, part, split, names, beam, words).items()
            }
    finally:
        model.train(was_training)


def _part_scores(
    model: FineTuned,
    cfg: FineTuneConfig,
    name: str,
    part: Part,
    names: Sequence[str],
    beam: int,
    words: LanguageModel | None,
) -> dict[str, float]:
    device = next(model.parameters()).device
    logits: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    heard: list[str] = []
    said: list[str] = []
    vocabulary = Vocabulary(tuple(names))
    for source, padding, label in part.batches(BATCH[model.modality]):
        padding = None if padding is None else padding.to(device)
        out, padded = model(source.to(device), padding)
        rows = out.float().cpu() if padded is None or out.ndim < 3 else out[~padded].float().cpu()
        done = len(said) + sum(map(len, labels))
        where = f"samples {done} to {done + len(out)} of part {name}"
        check_finite("evaluate", "outputs", [(where, rows.numpy())], model)
        if cfg.head.task == "ctc":
            found = beam_search(out, padded, beam, words) if beam else greedy(out, padded)
            heard += [vocabulary.decode(ids) for ids in found]
            said += label
        else:
            logits.append(out.cpu().numpy())
            labels.append(label.numpy())
    if not logits and not said:
        raise DataError(f"evaluate: part {name} has no readable sample")
    if cfg.head.task == "ctc":
        return transcript_scores(heard, said)
    scores, truth = np.concatenate(logits), np.concatenate(labels)
    if cfg.head.regression:
        return regression_scores(scores[:, 0], truth)
    if cfg.head.task == "sentence":
        return class_scores(scores, truth, GLUE_METRICS.get(cfg.glue or "", ("accuracy",)))
    return class_scores(scores, truth)


def run_eval(
    path: str | Path,
    data: str | None = None,
    *,
    step: int | None = None,
    beam: int = 0,
    lm: str | Path | None = None,
    lm_weight: float = WEIGHT,
    word_bonus: float = BONUS,
    backend: str | None = None,
) -> dict[str, Any]:
    """Score a fine-tuned run again, print one line per part and metric, and return the scores.

    path: a run of `d2v finetune`, or a checkpoint folder in it. data: another data set of the same classes or
    letters (not all of which need occur), of which what is held out is scored, or all where nothing is; none:
    the run's own. step: of a checkpoint; none: the best one. beam, lm, lm_weight, word_bonus: of the search
    for CTC, see `language_model`. backend: as in D2VKERN_BACKEND; none: the run's.
    Raises CheckpointError, ValueError and DataError.
    """
    check_backends(backend)
    if beam < 0:
        raise ValueError(f"eval: beam must be at least 0, got {beam}")
    if lm is not None and not beam:
        raise ValueError("eval: --lm needs a beam search: --beam 50, for example")
    run, device = find_run(path)[0], pick_device("auto")
    if not (run / SETTINGS).is_file():
        raise ValueError(f"eval: {path}: a run of `d2v finetune` is needed, with its settings and labels")
    model, cfg, own = load_run(path, step=step)
    if cfg.head.task != "ctc" and (beam or lm is not None):
        flag = "--beam" if lm is None else "--lm"
        raise ValueError(f"eval: {flag} is for task ctc, {path} is for {cfg.head.task}")
    model.to_device(device, cfg.train.precision)
    if data is not None and isinstance(cfg.model.front, ImageFront) and cfg.data.mean is None:
        cfg = normalised(cfg, _measured_again(run, own, cfg, device))
    names = json.loads((run / LABELS).read_text(encoding="utf-8"))
    if data is None or os.path.realpath(data) == os.path.realpath(own):
        parts = open_tune_data(own, cfg, device=device, encoder_dir=None, run_dir=run).parts
    else:
        parts = open_to_score(data, cfg, names, run_dir=run)
    words = None
    if lm is not None:
        spoken = (part for part in parts.values() if isinstance(part, SpokenPart))
        said = {word for part in spoken for text in part.texts for word in text.split()}
        words = LanguageModel(lm, names, lm_weight, word_bonus, said)
    with use_backends_of(cfg.train.backend, backend):
        if backend is not None:
            cfg = replace(cfg, train=replace(cfg.train, backend=backend))
        scores = evaluate(model, cfg, parts, names, beam, words)
    for name, score in scores.items():
        count = len(parts[name.rpartition("/")[0]])
        print(f"{name:<28} {score:.4f}  ({count:,} samples)")
    for line in unused(parts.values()):
        print(line)
    return scores


def _measured_again(run: Path, own: str, cfg: FineTuneConfig, device: torch.device) -> Normalisation | None:
    """How an older run without a record normalised its training pictures: from them, if still there."""
    try:
        return open_tune_data(own, cfg, device=device, encoder_dir=None, run_dir=run).loader.normalisation
    except DataError as error:
        print(f"note: how {run} normalised its pictures is recorded nowhere, and its data are gone ({error})")
        return None


GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
}
"""GLUE task -> its metrics, the one that decides first (Wang et al., 2019, table 1)"""


def class_scores(logits: np.ndarray, labels: np.ndarray, names: Sequence[str] = ()) -> dict[str, float]:
    """Of logits [n,C] and labels [n] int64: "top1", "top5" where there are more than 5 classes, and `names`.

    names: accuracy, matthews, f1 (of class 1). Shares of 1, not percent.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    predicted = logits.argmax(1)
    known = {
        "accuracy": lambda: float((predicted == labels).mean()),
        "matthews": lambda: float(matthews_corrcoef(labels, predicted)),
        "f1": lambda: float(f1_score(labels, predicted, pos_label=1, zero_division=0.0)),
    }
    if names:
        return {name: known[name]() for name in names}
    scores = {"top1": known["accuracy"]()}
    if logits.shape[1] > 5:
        best = np.argpartition(-logits, 5, axis=1)[:, :5]
        scores["top5"] = float((best == labels[:, None]).any(1).mean())
    return scores


def regression_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of two arrays [n] of numbers: "pearson", "spearman" (0 where one of them is constant) and "mse"."""
    from scipy.stats import pearsonr, spearmanr

    mse = float(np.mean((predicted - labels) ** 2))
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "mse": mse}
    return {
        "pearson": float(pearsonr(predicted, labels).statistic),
        "spearman": float(spearmanr(predicted, labels).statistic),
        "mse": mse,
    }


def transcript_scores(heard: Sequence[str], said: Sequence[str]) -> dict[str, float]:
    """WER and CER over all utterances: edits over the words, or letters and spaces, of what was said."""
    import jiwer

    return {
        "wer": float(jiwer.wer(list(said), list(heard))),
        "cer": float(jiwer.cer(list(said), list(heard))),
    }
