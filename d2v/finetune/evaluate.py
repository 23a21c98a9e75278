"""Scores of a fine-tuned model on held-out parts, while training and for `d2v eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backends import check_backends, use_backends, use_backends_of
from ..checkpoint import SETTINGS, find_run
from ..data import DataError
from ..extract import BATCH, check_finite
from ..fronts import ImageFront
from ..normalisation import Normalisation, normalised
from ..train import pick_device
from .config import FineTuneConfig
from .data import Part, open_tune_data
from .decode import beam_search, greedy
from .language_model import LanguageModel
from .load import LABELS, load_run
from .metrics import GLUE_METRICS, class_scores, regression_scores, transcript_scores
from .model import FineTuned
from .transcripts import Vocabulary


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
    lm_weight: float = 2.0,
    word_bonus: float = -1.0,
    backend: str | None = None,
) -> dict[str, Any]:
    """Score a fine-tuned run again, print one line per part and metric, and return the scores.

    path: a run of `d2v finetune`, or a checkpoint folder in it. data: another data set of the same classes or
    letters; none: the run's own. step: of a checkpoint; none: the best one. beam, lm, lm_weight, word_bonus:
    of the search for CTC, see `language_model`. backend: as in D2VKERN_BACKEND; none: the run's.
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
    model.to_device(device, cfg.train.precision)
    if data is not None and isinstance(cfg.model.front, ImageFront) and cfg.data.mean is None:
        cfg = normalised(cfg, _measured_again(run, own, cfg, device))
    found = open_tune_data(data or own, cfg, device=device, encoder_dir=None, run_dir=run)
    names = json.loads((run / LABELS).read_text(encoding="utf-8"))
    if found.names != names:
        other = next(iter(sorted(set(found.names) ^ set(names))), "their order")
        raise DataError(f"eval: {data} has other classes than {path} was trained on: {other}")
    if lm is not None and cfg.head.task != "ctc":
        raise ValueError(f"eval: --lm is for task ctc, {path} is for {cfg.head.task}")
    words = None if lm is None else LanguageModel(lm, names, lm_weight, word_bonus)
    with use_backends_of(cfg.train.backend, backend):
        if backend is not None:
            cfg = replace(cfg, train=replace(cfg.train, backend=backend))
        scores = evaluate(model, cfg, found.parts, found.names, beam, words)
    for name, score in scores.items():
        print(f"{name:<28} {score:.4f}")
    return scores


def _measured_again(run: Path, own: str, cfg: FineTuneConfig, device: torch.device) -> Normalisation | None:
    """How an older run without a record normalised its training pictures: from them, if still there."""
    try:
        return open_tune_data(own, cfg, device=device, encoder_dir=None, run_dir=run).loader.normalisation
    except DataError as error:
        print(f"note: how {run} normalised its pictures is recorded nowhere, and its data are gone ({error})")
        return None
