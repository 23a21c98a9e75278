"""Eager masks: which tokens each of the N = B * M rows keeps, bit for bit reproducible by any backend.

The block samplers are fairseq's compute_block_mask_1d and _2d (fairseq/data/data_utils.py). A row draws
`centres` block centres, centre j = below(draw j, T), and marks the union of the blocks around them,
truncated at the border. The union is then equalised to exactly `target` cells: of too many, uniformly chosen
marked cells are un-marked; if too few, uniformly chosen unmarked cells are marked. Both are one rule on
integers. Each cell t has a 32-bit priority (draw t of its own stream) and

    the row's cells are the `target` smallest by (unmarked, priority, t)

where `unmarked` is 0 in the union and 1 outside. Equal priorities (one pair in 2^32) go to the smaller t.

All functions take checked arguments and return (mask, ids_keep, slot), the tensors of a MaskPlan. Shapes are
known without looking at values: no device sync, and torch.compile(fullgraph=True) traces them. Seed and epoch
are ints or 0-dim int64 tensors.
"""

# B samples, M clones per sample, N = B * M rows, T tokens, K kept

from collections.abc import Callable

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.reference.philox import CENTRES, PRIORITIES, Word, below, row_draws

MaskTensors = tuple[Tensor, Tensor, Tensor]
Samplers = tuple[Callable[..., MaskTensors], Callable[..., MaskTensors], Callable[..., MaskTensors]]


def samplers_with(sample: Callable[..., MaskTensors]) -> Samplers:
    """inverse_block_mask, span_mask and random_mask of one sampler for all of them.

    sample: called as `_sample`, with seed and epoch by name.
    """

    def inverse_block_mask(
        ids: Tensor,
        clones: int,
        grid: tuple[int, int],
        *,
        centres: int,
        kept: int,
        length: int,
        **words: Word,
    ) -> MaskTensors:
        """Visible squares of side `length` on a grid, the rest masked; exactly `kept` cells are visible."""
        return sample(ids, clones, grid, (length, length), centres, kept, True, **words)

    def span_mask(
        ids: Tensor, clones: int, tokens: int, *, centres: int, masked: int, length: int, **words: Word
    ) -> MaskTensors:
        """Masked spans of `length` tokens; exactly `masked` tokens are masked."""
        return sample(ids, clones, (1, tokens), (1, length), centres, masked, False, **words)

    def random_mask(ids: Tensor, clones: int, tokens: int, *, kept: int, **words: Word) -> MaskTensors:
        """The `kept` tokens of smallest (priority, t) stay, the others are masked."""
        return sample(ids, clones, (1, tokens), (1, 1), 0, kept, True, **words)

    return inverse_block_mask, span_mask, random_mask


@op_range("masks/fwd/eager", _costs.masks)
def _sample(
    ids: Tensor,
    clones: int,
    grid: tuple[int, int],
    block: tuple[int, int],
    centres: int,
    target: int,
    keep_chosen: bool,
    *,
    seed: Word,
    epoch: Word,
) -> MaskTensors:
    """`target` cells, those in blocks (squares, or spans of a row) first, are those kept or those masked."""
    (height, width), length = grid, block[1]
    marked = torch.zeros(ids.shape[0] * clones, height * width, dtype=torch.bool, device=ids.device)
    if centres:
        cells_NC = below(row_draws(ids, clones, centres, CENTRES, seed=seed, epoch=epoch), height * width)
        reach = torch.arange(length, device=ids.device) - length // 2
        if height == 1:
            blocks = (cells_NC[..., None] + reach).clamp_(0, width - 1)
        else:
            rows_NCR = (cells_NC[..., None] // width + reach).clamp_(0, height - 1)
            columns_NCR = (cells_NC[..., None] % width + reach).clamp_(0, width - 1)
            blocks = rows_NCR[..., :, None] * width + columns_NCR[..., None, :]
        marked.scatter_(1, blocks.flatten(1), True)
    chosen = _equalise(marked, target, ids, clones, seed, epoch)
    if keep_chosen:
        return plan_tensors(~chosen, target)
    return plan_tensors(chosen, height * width - target)


inverse_block_mask, span_mask, random_mask = samplers_with(_sample)


def plan_tensors(mask: Tensor, kept: int, padded: bool = False) -> MaskTensors:
    """(mask, ids_keep, slot) of a [N, T] bool mask whose rows keep `kept` tokens, or with padded at most."""
    keep = ~mask
    order = keep.cumsum(1, dtype=torch.int32) - 1
    slot = torch.where(keep, order, -1)
    return mask, ascending_positions(keep, kept, padded), slot


def ascending_positions(selected: Tensor, count: int, padded: bool = False) -> Tensor:
    """[N, count] int32: where each row of `selected` [N, T] is True, ascending.

    Exactly `count` per row; with padded at most, and -1 behind them.
    """
    rows, tokens = selected.shape
    order = selected.cumsum(1) - 1
    # Cells that are not selected write to one surplus column, which is cut off.
    out = torch.empty(rows, count + 1, dtype=torch.int32, device=selected.device)
    if padded:
        out.fill_(-1)
    cells = torch.arange(tokens, dtype=torch.int32, device=selected.device).expand(rows, tokens)
    out.scatter_(1, torch.where(selected, order, count), cells)
    return out[:, :count].contiguous()


def _equalise(marked: Tensor, target: int, ids: Tensor, clones: int, seed: Word, epoch: Word) -> Tensor:
    """The `target` smallest cells of each row by (unmarked, priority, position), as a [N, T] bool."""
    tokens = marked.shape[1]
    priority = row_draws(ids, clones, tokens, PRIORITIES, seed=seed, epoch=epoch)
    position = torch.arange(tokens, device=ids.device)
    # 1 + 32 + 20 bits; all keys of a row differ, so the threshold selects exactly `target` cells.
    key = (~marked).long() << 52 | priority << 20 | position
    threshold = key.topk(target, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    return key <= threshold
