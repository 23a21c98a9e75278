"""The three mask samplers of a backend's kernel, which is one for all of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._library import Kernel
from d2vkern.reference.masks import MaskTensors
from d2vkern.reference.philox import Word, split64

Samplers = tuple[Callable[..., MaskTensors], Callable[..., MaskTensors], Callable[..., MaskTensors]]


def _kept(grid: list[int], target: int, keep_chosen: bool) -> int:
    return target if keep_chosen else grid[0] * grid[1] - target


def _outputs(
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
    return (
        ids.new_empty((rows, tokens), dtype=torch.bool),
        ids.new_empty((rows, _kept(grid, target, keep_chosen)), dtype=torch.int32),
        ids.new_empty((rows, tokens), dtype=torch.int32),
    )


MASKS_FWD = Kernel(
    "masks_fwd(Tensor ids, Tensor? seed, Tensor? epoch, SymInt[] words, SymInt clones, SymInt[] grid, "
    "SymInt[] block, SymInt centres, SymInt target, bool keep_chosen) -> (Tensor, Tensor, Tensor)",
    "masks/fwd",
    _outputs,
    lambda ids, seed, epoch, words, clones, grid, block, centres, *rest: _costs.masks(
        ids, clones, grid, kept=_kept(grid, *rest)
    ),
)


def samplers_with(masks_fwd: Callable[..., MaskTensors]) -> Samplers:
    """inverse_block_mask, span_mask and random_mask of a kernel called as MASKS_FWD."""

    def masks(
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
        seed_tensor, epoch_tensor = (x if isinstance(x, Tensor) else None for x in (seed, epoch))
        words = (*split64(0 if isinstance(seed, Tensor) else seed), 0 if isinstance(epoch, Tensor) else epoch)
        return masks_fwd(
            ids, seed_tensor, epoch_tensor, words, clones, grid, block, centres, target, keep_chosen
        )

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
        return masks(ids, clones, grid, (length, length), centres, kept, True, seed, epoch)

    def span_mask(
        ids: Tensor,
        clones: int,
        tokens: int,
        *,
        centres: int,
        masked: int,
        length: int,
        seed: Word,
        epoch: Word,
    ) -> MaskTensors:
        return masks(ids, clones, (1, tokens), (1, length), centres, masked, False, seed, epoch)

    def random_mask(
        ids: Tensor, clones: int, tokens: int, *, kept: int, seed: Word, epoch: Word
    ) -> MaskTensors:
        return masks(ids, clones, (1, tokens), (1, 1), 0, kept, True, seed, epoch)

    return inverse_block_mask, span_mask, random_mask
