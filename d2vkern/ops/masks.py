"""Masks for M masked versions of each sample.

Generated on the device of `ids` from a counter-based generator (d2vkern/reference/philox.py): the row of
clone m of a sample is a function of (seed, epoch, sample id, m) and the mask's own settings, and of nothing
else. The distributions are those the official data2vec 2.0 models were trained with: fairseq's
compute_block_mask_2d and compute_block_mask_1d (data_utils.py) for images and speech, random_masking
(modalities/base.py) for text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2vkern._backend import select
from d2vkern._checks import check_dtype, check_range, check_same_device, check_seed, check_shape
from d2vkern.ops._plan import MaskPlan
from d2vkern.reference.philox import MAX_CLONES, MAX_DRAWS, MAX_EPOCH

__all__ = ["MAX_TOKENS", "MaskPlan", "inverse_block_mask", "random_mask", "span_mask"]

MAX_TOKENS = MAX_DRAWS // 2


def inverse_block_mask(
    ids: Tensor,
    clones: int,
    grid: tuple[int, int],
    *,
    prob: float,
    length: int,
    adjust: float = 0.0,
    seed: int | Tensor = 0,
    epoch: int | Tensor = 0,
    backend: str | None = None,
) -> MaskPlan:
    """Image masks: visible squares are placed, the rest is masked (compute_block_mask_2d with inverse_mask).

    ids: [B] int64 sample ids, on the device the masks are wanted on.
    clones: M masked versions per sample, at most 4096.
    grid: (rows, columns) of patches; tokens are row-major, T = rows * columns.
    prob: share of tokens masked, in (0, 1). Exactly K = int(T * (1 - prob)) tokens stay visible in every row.
    length: side of a visible square, centre included; an even side reaches one further up and left.
    adjust: in [0, 1], added to the visible share when squares are counted; int(T * ((1 - prob + adjust) /
        length^2)) are placed, centres uniform with replacement, truncated at the border; then uniformly
        chosen single cells are added or removed until the count is exact.
    seed, epoch: 64-bit seed and epoch number (0 .. 2^32 - 1); a change of either changes every mask. Each is
        an int, or a 0-dim int64 tensor on the device of ids (read there, so that a replayed CUDA graph can be
        given another; the values are not checked, of an epoch the low 32 bits count).
    Raises ValueError or TypeError for arguments out of range, and ValueError when nothing would be kept.
    """
    op = "inverse_block_mask"
    check_range(op, "grid rows", grid[0], minimum=1)
    check_range(op, "grid columns", grid[1], minimum=1)
    tokens = grid[0] * grid[1]
    seed = _check_common(op, ids, clones, tokens, prob, seed, epoch)
    _check_blocks(op, length, adjust)
    visible = 1.0 - prob
    centres = int(tokens * ((visible + adjust) / length**2))
    kept = int(tokens * visible)
    _check_counts(op, tokens, kept, prob)
    mask, ids_keep, slot = select("masks", backend, ids).inverse_block_mask(
        ids, clones, grid, centres=centres, kept=kept, length=length, seed=seed, epoch=epoch
    )
    return MaskPlan(mask, ids_keep, slot, clones)


def span_mask(
    ids: Tensor,
    clones: int,
    tokens: int,
    *,
    prob: float,
    length: int,
    adjust: float = 0.0,
    seed: int | Tensor = 0,
    epoch: int | Tensor = 0,
    backend: str | None = None,
) -> MaskPlan:
    """Speech masks: masked spans, equalised by single time steps (compute_block_mask_1d).

    tokens: T time steps. Exactly int(T * prob) of them are masked in every row.
    length: tokens in a span, centre included; an even span reaches one further back.
    adjust: in [0, 1], added to the masked share when spans are counted: int(T * ((prob + adjust) / length)).
    Other arguments and errors as in `inverse_block_mask`.
    """
    op = "span_mask"
    seed = _check_common(op, ids, clones, tokens, prob, seed, epoch)
    _check_blocks(op, length, adjust)
    centres = int(tokens * ((prob + adjust) / length))
    masked = int(tokens * prob)
    _check_counts(op, tokens, tokens - masked, prob)
    mask, ids_keep, slot = select("masks", backend, ids).span_mask(
        ids, clones, tokens, centres=centres, masked=masked, length=length, seed=seed, epoch=epoch
    )
    return MaskPlan(mask, ids_keep, slot, clones)


def random_mask(
    ids: Tensor,
    clones: int,
    tokens: int,
    *,
    prob: float,
    seed: int | Tensor = 0,
    epoch: int | Tensor = 0,
    backend: str | None = None,
) -> MaskPlan:
    """Text masks: tokens chosen one by one (random_masking).

    tokens: T. Exactly K = int(T * (1 - prob)) of them are kept in every row, any set of K equally likely.
    Other arguments and errors as in `inverse_block_mask`.
    """
    op = "random_mask"
    seed = _check_common(op, ids, clones, tokens, prob, seed, epoch)
    kept = int(tokens * (1.0 - prob))
    _check_counts(op, tokens, kept, prob)
    mask, ids_keep, slot = select("masks", backend, ids).random_mask(
        ids, clones, tokens, kept=kept, seed=seed, epoch=epoch
    )
    return MaskPlan(mask, ids_keep, slot, clones)


def _check_common(
    op: str, ids: Tensor, clones: int, tokens: int, prob: float, seed: int | Tensor, epoch: int | Tensor
) -> int | Tensor:
    """Returns the seed as backends take it."""
    check_shape(op, "ids", ids, ("B",))
    check_dtype(op, "ids", ids, (torch.int64,))
    check_range(op, "clones", clones, minimum=1, maximum=MAX_CLONES)
    check_range(op, "tokens", tokens, minimum=1, maximum=MAX_TOKENS)
    seed = check_seed(op, seed)
    if isinstance(epoch, Tensor):
        check_shape(op, "epoch", epoch, ())
        check_dtype(op, "epoch", epoch, (torch.int64,))
    else:
        check_range(op, "epoch", epoch, minimum=0, maximum=MAX_EPOCH)
    for name, value in (("seed", seed), ("epoch", epoch)):
        if isinstance(value, Tensor):
            check_same_device(op, **{"ids": ids, name: value})
    if not 0.0 < prob < 1.0:
        raise ValueError(f"{op}: prob must be in (0, 1), got {prob}")
    return seed


def _check_blocks(op: str, length: int, adjust: float) -> None:
    check_range(op, "length", length, minimum=1)
    check_range(op, "adjust", adjust, minimum=0.0, maximum=1.0)


def _check_counts(op: str, tokens: int, kept: int, prob: float) -> None:
    if not 0 < kept < tokens:
        what = "keep" if kept == 0 else "mask"
        raise ValueError(f"{op}: tokens must be enough to {what} at least one at prob {prob}, got {tokens}")
