"""Scores of a held-out part: top-1 and top-5, word and letter error rates, GLUE's own metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
SMALLER_IS_BETTER = ("wer", "cer", "mse")


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


def is_better(name: str, new: float, old: float | None) -> bool:
    """Whether a score of metric `name` beats an older one."""
    if old is None:
        return True
    return new < old if name.split("/")[-1] in SMALLER_IS_BETTER else new > old
