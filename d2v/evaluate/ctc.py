"""From CTC's frames to letters: the best path, and prefix beam search."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.tuned import BLANK
from .language_model import LanguageModel

Prefix = tuple[int, ...]

PRUNE = -12.0
"""log probability of a letter at a frame below which no prefix is continued with it"""


def _lengths(logits: Tensor, padded: Tensor | None) -> list[int]:
    return [logits.shape[1]] * len(logits) if padded is None else (~padded).sum(1).tolist()


def greedy(logits: Tensor, padded: Tensor | None) -> list[list[int]]:
    """Letters of each utterance: its best path, repeats merged and blanks removed.

    logits: [B,T,V]. padded: [B,T] bool (True) or None.
    """
    found = []
    for path, length in zip(logits.argmax(-1), _lengths(logits, padded), strict=True):
        merged = torch.unique_consecutive(path[:length])
        found.append(merged[merged != BLANK].tolist())
    return found


def beam_search(
    logits: Tensor, padded: Tensor | None, width: int, words: LanguageModel | None = None
) -> list[list[int]]:
    """Letters of each utterance: the best of the `width` prefixes kept at each frame.

    A prefix's probability is summed over all of its paths; with `words` its score is that and the language
    model's (Graves et al., 2006; Hannun et al., 2014, algorithm 1). Other arguments as `greedy`.
    """
    if width < 1:
        raise ValueError(f"beam_search: width must be positive, got {width}")
    rows = logits.float().log_softmax(-1).cpu().double()
    return [_search(row[:length].tolist(), width, words)
            for row, length in zip(rows, _lengths(logits, padded), strict=True)]  # fmt: skip


def _search(frames: list[list[float]], width: int, words: LanguageModel | None) -> list[int]:
    if words is not None:
        words.begin()
    # prefix -> log probabilities of its paths that end in blank, and in its last letter
    beams: dict[Prefix, tuple[float, float]] = {(): (0.0, -math.inf)}
    for frame in frames:
        letters = [i for i, p in enumerate(frame) if i != BLANK and p > PRUNE]
        blanks: defaultdict[Prefix, float] = defaultdict(lambda: -math.inf)
        ends: defaultdict[Prefix, float] = defaultdict(lambda: -math.inf)
        for prefix, (blank, end) in beams.items():
            blanks[prefix] = _add(blanks[prefix], _add(blank, end) + frame[BLANK])
            if prefix:
                ends[prefix] = _add(ends[prefix], end + frame[prefix[-1]])
            for letter in letters:
                # a letter repeats only after a blank
                before = blank if prefix and letter == prefix[-1] else _add(blank, end)
                longer = (*prefix, letter)
                ends[longer] = _add(ends[longer], before + frame[letter])
        scored = {prefix: (blanks[prefix], ends[prefix]) for prefix in {*blanks, *ends}}
        beams = dict(_ranked(scored, words)[:width])
    return list(_ranked(beams, words, ended=True)[0][0])


def _ranked(
    beams: Mapping[Prefix, tuple[float, float]], words: LanguageModel | None, *, ended: bool = False
) -> list[tuple[Prefix, tuple[float, float]]]:
    """Best first; of equal ones the smaller."""

    def score(prefix: Prefix) -> float:
        return _add(*beams[prefix]) + (words.score(prefix, ended=ended) if words is not None else 0.0)

    return sorted(beams.items(), key=lambda item: (-score(item[0]), item[0]))


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    low, high = sorted((a, b))
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
