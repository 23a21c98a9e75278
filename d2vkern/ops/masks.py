"""Masks for M masked versions of each sample, and the MaskPlan every other op reads.

Generated on the device of `ids` from a counter-based generator (d2vkern/reference/philox.py): the row of
clone m of a sample is a function of (seed, epoch, sample id, m) and the mask's own settings, and of nothing
else. The distributions are those the official data2vec 2.0 models were trained with: fairseq's
compute_block_mask_2d and compute_block_mask_1d (data_utils.py) for images and speech, random_masking
(modalities/base.py) for text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from d2vkern._backend import select
from d2vkern._checks import check_dtype, check_range, check_same_device, check_seed, check_shape
from d2vkern.reference.masks import ascending_positions, plan_tensors
from d2vkern.reference.philox import MAX_CLONES, MAX_DRAWS, MAX_EPOCH

MAX_TOKENS = MAX_DRAWS // 2


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """Which tokens each of the N = B * clones rows keeps; row b * clones + m is masked version m of sample b.

    mask: [N, T] bool, True where masked.
    ids_keep: [N, K] int32, original positions of the kept tokens, ascending.
    slot: [N, T] int32, index of the token among its row's kept tokens, -1 where masked.
    clones: M, masked versions per sample.
    lengths: [N] int32 or None: in a padded batch, how many of the T tokens of a row are real (before masking;
        padding stands at the end). The ops here mask padding like any other token; who pads reads `lengths`.

    Construction checks shapes, dtypes and devices, not values; see `MaskPlan.from_mask`.
    """

    mask: Tensor
    ids_keep: Tensor
    slot: Tensor
    clones: int
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        op = "MaskPlan"
        check_shape(op, "mask", self.mask, ("N", "T"))
        rows, tokens = self.mask.shape
        check_range(op, "tokens T", tokens, minimum=1)
        check_range(op, "clones", self.clones, minimum=1)
        if rows % self.clones:
            raise ValueError(f"{op}: mask must have a multiple of clones = {self.clones} rows, got {rows}")
        check_shape(op, "ids_keep", self.ids_keep, (rows, "K"))
        check_range(op, "kept tokens K", self.ids_keep.shape[1], maximum=tokens)
        check_shape(op, "slot", self.slot, (rows, tokens), like="mask")
        check_dtype(op, "mask", self.mask, (torch.bool,))
        check_dtype(op, "ids_keep", self.ids_keep, (torch.int32,))
        check_dtype(op, "slot", self.slot, (torch.int32,))
        if self.lengths is not None:
            check_shape(op, "lengths", self.lengths, (rows,))
            check_dtype(op, "lengths", self.lengths, (torch.int32,))
        check_same_device(op, mask=self.mask, ids_keep=self.ids_keep, slot=self.slot, lengths=self.lengths)
        if torch.compiler.is_compiling():
            return
        for name in ("mask", "ids_keep", "slot", "lengths"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.is_inference():
                # autograd saves no tensor that was made under inference_mode, and a plan may outlive it
                with torch.inference_mode(False):
                    object.__setattr__(self, name, tensor.clone())

    @property
    def samples(self) -> int:
        """B, samples before they are repeated."""
        return self.mask.shape[0] // self.clones

    @property
    def tokens(self) -> int:
        """T, tokens before masking."""
        return self.mask.shape[1]

    @property
    def kept(self) -> int:
        """K, kept tokens of every row."""
        return self.ids_keep.shape[1]

    @property
    def ids_mask(self) -> Tensor:
        """[N, T - K] int32: original positions of the masked tokens, ascending; made at the first use."""
        # Dynamo cannot trace the lock that cached_property takes before Python 3.12.
        return self._find_masked() if torch.compiler.is_compiling() else self._masked

    @cached_property
    def _masked(self) -> Tensor:
        with torch.inference_mode(False):
            return self._find_masked()

    def _find_masked(self) -> Tensor:
        return ascending_positions(self.mask, self.tokens - self.kept)

    def to(self, device: torch.device | str) -> MaskPlan:
        """The same plan on another device (itself when it is there already)."""
        if self.mask.device == torch.device(device):
            return self
        lengths = None if self.lengths is None else self.lengths.to(device)
        mask, ids_keep, slot = (tensor.to(device) for tensor in (self.mask, self.ids_keep, self.slot))
        return MaskPlan(mask, ids_keep, slot, self.clones, lengths)

    @classmethod
    def from_mask(cls, mask: Tensor, clones: int, lengths: Tensor | None = None) -> MaskPlan:
        """The plan of anyone's mask.

        mask: [N, T] bool or integer, non-zero = masked; every row must keep equally many tokens.
        clones: M, a divisor of N; rows b * M .. b * M + M - 1 belong to sample b.
        Reads the kept counts, so on CUDA it waits for the device, and torch.compile cannot trace it.
        Raises ValueError naming the first row whose kept count differs from row 0's.
        """
        check_shape("MaskPlan.from_mask", "mask", mask, ("N", "T"))
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"MaskPlan.from_mask: mask must be bool or integer, got {mask.dtype}")
        mask = mask != 0
        counts = (~mask).sum(1).tolist()
        kept = counts[0] if counts else 0
        for row, count in enumerate(counts):
            if count != kept:
                raise ValueError(
                    f"MaskPlan.from_mask: mask must keep equally many tokens in every row, "
                    f"got row {row} keeps {count} tokens, row 0 keeps {kept}"
                )
        mask, ids_keep, slot = plan_tensors(mask, kept)
        return cls(mask, ids_keep, slot, clones, lengths)


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
