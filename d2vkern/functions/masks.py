"""The three mask samplers of a backend's kernel, which is one for all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._library import Kernel
from d2vkern.reference.masks import MaskTensors, Samplers, samplers_with
from d2vkern.reference.philox import Word, split64


def _outputs(
    ids: Tensor, seed: Tensor | None, epoch: Tensor | None, words: list[int], clones: int, *settings: Any
) -> MaskTensors:
    grid, _block, _centres, target, keep_chosen = settings
    rows, tokens = ids.shape[0] * clones, grid[0] * grid[1]
    kept = target if keep_chosen else tokens - target
    return (
        ids.new_empty((rows, tokens), dtype=torch.bool),
        ids.new_empty((rows, kept), dtype=torch.int32),
        ids.new_empty((rows, tokens), dtype=torch.int32),
    )


MASKS_FWD = Kernel(
    "masks_fwd(Tensor ids, Tensor? seed, Tensor? epoch, SymInt[] words, SymInt clones, SymInt[] grid, "
    "SymInt[] block, SymInt centres, SymInt target, bool keep_chosen) -> (Tensor, Tensor, Tensor)",
    "masks/fwd",
    _outputs,
    lambda ids, seed, epoch, words, *rest: _costs.masks(ids, *rest),
)


def samplers_of(masks_fwd: Callable[..., MaskTensors]) -> Samplers:
    """inverse_block_mask, span_mask and random_mask of a kernel called as MASKS_FWD."""

    def sample(ids: Tensor, *settings: Any, seed: Word, epoch: Word) -> MaskTensors:
        """Words of an int seed and epoch go in as arguments, those of a tensor are read by the kernel."""
        seed_tensor = epoch_tensor = None
        if isinstance(seed, Tensor):
            seed_tensor, seed = seed, 0
        if isinstance(epoch, Tensor):
            epoch_tensor, epoch = epoch, 0
        return masks_fwd(ids, seed_tensor, epoch_tensor, (*split64(seed), epoch), *settings)

    return samplers_with(sample)
