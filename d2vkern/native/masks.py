"""Masks by the compiled extension: csrc/masks.cpp on CPUs, csrc/masks.cu on CUDA, eager's bits on both."""

import torch
from torch import Tensor

from d2vkern import _costs, _native
from d2vkern._nvtx import op_range
from d2vkern.reference.philox import Word, split64

MaskTensors = tuple[Tensor, Tensor, Tensor]


def _fake(
    ids: Tensor,
    seed: Tensor | None,
    epoch: Tensor | None,
    words: list[int],
    clones: int,
    grid: list[int],
    block: list[int],
    centres: int,
    target: int,
    keep_chosen: bool,
) -> MaskTensors:
    rows, tokens = ids.shape[0] * clones, grid[0] * grid[1]
    kept = target if keep_chosen else tokens - target
    return (
        ids.new_empty((rows, tokens), dtype=torch.bool),
        ids.new_empty((rows, kept), dtype=torch.int32),
        ids.new_empty((rows, tokens), dtype=torch.int32),
    )


_masks_fwd = _native.op("masks_fwd", _fake)


@op_range("masks/fwd/native", _costs.masks)
def inverse_block_mask(
    ids: Tensor,
    clones: int,
    grid: tuple[int, int],
    *,
    centres: int,
    kept: int,
    length: int,
    seed: Word,
    epoch: Word,
) -> MaskTensors:
    """Visible squares of side `length` on a grid, the rest masked; exactly `kept` cells are visible."""
    return _masks(ids, clones, grid, (length, length), centres, kept, True, seed, epoch)


@op_range("masks/fwd/native", _costs.masks)
def span_mask(
    ids: Tensor, clones: int, tokens: int, *, centres: int, masked: int, length: int, seed: Word, epoch: Word
) -> MaskTensors:
    """Masked spans of `length` tokens; exactly `masked` tokens are masked."""
    return _masks(ids, clones, (1, tokens), (1, length), centres, masked, False, seed, epoch)


@op_range("masks/fwd/native", _costs.masks)
def random_mask(ids: Tensor, clones: int, tokens: int, *, kept: int, seed: Word, epoch: Word) -> MaskTensors:
    """The `kept` tokens of smallest (priority, t) stay, the others are masked."""
    return _masks(ids, clones, (1, tokens), (1, 1), 0, kept, True, seed, epoch)


def _masks(
    ids: Tensor,
    clones: int,
    grid: tuple[int, int],
    block: tuple[int, int],
    centres: int,
    target: int,
    keep_chosen: bool,
    seed: Word,
    epoch: Word,
) -> MaskTensors:
    """Words of an int seed and epoch go in as arguments, those of a tensor are read by the kernel."""
    seed_tensor, epoch_tensor = (value if isinstance(value, Tensor) else None for value in (seed, epoch))
    words = (*split64(0 if isinstance(seed, Tensor) else seed), 0 if isinstance(epoch, Tensor) else epoch)
    return _masks_fwd(
        ids, seed_tensor, epoch_tensor, words, clones, grid, block, centres, target, keep_chosen
    )
