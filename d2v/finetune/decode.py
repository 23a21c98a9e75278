"""From CTC's frames to letters: the best path, and prefix beam search."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

BLANK = 0
"""fairseq's <s>"""
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


def beam_search(logits: Tensor, padded: Tensor | None, width: int) -> list[list[int]]:
    """Letters of each utterance: the most probable of the `width` prefixes kept at each frame.

    A prefix's probability is summed over all of its paths (Graves et al., 2006; Hannun et al., 2014,
    algorithm 1 without a language model). Arguments as `greedy`.
    """
    if width < 1:
        raise ValueError(f"beam_search: width must be positive, got {width}")
    rows = logits.float().log_softmax(-1).cpu().double()
    return [_search(row[:length].tolist(), width)
            for row, length in zip(rows, _lengths(logits, padded), strict=True)]  # fmt: skip


def _search(frames: list[list[float]], width: int) -> list[int]:
    # prefix -> log probabilities of its paths that end in blank, and in its last letter
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for frame in frames:
        letters = [i for i, p in enumerate(frame) if i != BLANK and p > PRUNE]
        blanks: defaultdict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
        ends: defaultdict[tuple[int, ...], float] = defaultdict(lambda: -math.inf)
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
        ranked = sorted(scored.items(), key=lambda item: (-_add(*item[1]), item[0]))
        beams = dict(ranked[:width])
    return list(next(iter(beams)))  # the best comes first


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    low, high = sorted((a, b))
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
