"""Masks of N = B * M rows: block centres, priorities, exact counts and a MaskPlan's tensors, in one launch.

Formula, on integers, bit for bit that of `d2vkern/reference/masks.py`: centres and priorities are Philox
words keyed by (seed, epoch, sample id, m). A cell is marked when the block around some centre, truncated at
the border of the grid, covers it. A row's cells are the `target` smallest by (unmarked, priority, t). Speech
is a grid of one row with blocks of one row; text has no blocks.

Layout: mask [N, T] as bytes, slot [N, T] and ids_keep [N, K] int32, all contiguous; row n = b * M + m.

One program makes one row.
- Marks: in each row of the grid a block is one run of cells. Runs are clipped to words of 16 cells for 16
  centres at a time, so marking costs centres * T / 16, not centres * T; then words are spread over the cells.
- Choice: with `target` or more cells marked, marked cells compete for `target` places; with fewer, all of
  them are in and unmarked cells compete for the other places. The priority of the last place is found bit by
  bit, each a count over the row; where several cells have it, the smaller t goes first. No sort, no atomics.
- Prefix sums over the chosen cells give slot and every kept token's place in ids_keep.
Up to REGISTER_TOKENS all of that stays in registers. Longer rows are worked on in tiles; their priorities and
marks wait in the row's own slot and mask.

Bytes: 5 T + 4 K written per row and 8 read per sample, the floor. Tiles read what waits 33 times, from the L2
cache. No floating point, no backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern.functions.masks import MASKS_FWD, samplers_of
from d2vkern.kernels._common import as_signed, load_key, philox
from d2vkern.kernels._launch import launch
from d2vkern.kernels._tuning import choose, power_of_two_bucket
from d2vkern.reference.masks import MaskTensors
from d2vkern.reference.philox import CENTRES, PRIORITIES

REGISTER_TOKENS = 8192
"""the longest row that one program holds in registers"""
TILE = 4096
"""cells worked on at a time in a longer row"""

_CENTRES = tl.constexpr(CENTRES)
_PRIORITIES = tl.constexpr(PRIORITIES)
_CELLS = tl.constexpr(16)  # per word of marks, and centres at a time: words are as many values as cells


# Sizes of speech change from batch to batch: nothing is compiled anew when one becomes divisible by 16.
@triton.jit(
    do_not_specialize=["seed_low", "seed_high", "epoch", "units", "height", "width", "centres", "target"]
)
def masks_fwd_kernel(
    ids_ptr,  # [B] int64
    seed_ptr,  # [] int64; None: seed_low and seed_high
    epoch_ptr,  # [] int64; None: epoch
    mask_ptr,  # [N, T] uint8, 1 where masked
    slot_ptr,  # [N, T] int32
    ids_keep_ptr,  # [N, K] int32
    ids_stride_b,
    seed_low,
    seed_high,
    epoch,
    clones,
    units,
    height,
    width,
    centres,
    target,
    block_height,
    block_width,
    UNIT: tl.constexpr,  # T = units * UNIT = height * width: where rows start is known to be a multiple
    BLOCK_T: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    KEEP_CHOSEN: tl.constexpr,  # the chosen cells are kept; otherwise they are masked
    TILED: tl.constexpr,  # T > BLOCK_T
):
    n = tl.program_id(0)
    tokens = units * UNIT
    stream = _row_stream(
        ids_ptr + (n // clones).to(tl.int64) * ids_stride_b, n % clones,
        seed_ptr, seed_low, seed_high, epoch_ptr, epoch,
    )  # fmt: skip
    blocks = (height, width, centres, block_height, block_width)
    kept = target if KEEP_CHOSEN else tokens - target
    row = (mask_ptr + n.to(tl.int64) * tokens, slot_ptr + n.to(tl.int64) * tokens)
    ids_keep_ptr += n.to(tl.int64) * kept
    t = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    top = tl.full((), 1 << 31, tl.uint32)
    threshold = tl.full((), 0, tl.uint32)  # in the end the priority of the last place
    smaller = 0  # competitors below the threshold

    if TILED:
        union = 0
        for first in range(0, tokens, BLOCK_T):
            marked = _marks(stream, blocks, first, BLOCK_T, HAS_BLOCKS)
            union += tl.sum(marked, 0)
            _park(row, marked, _draws(stream, first, _PRIORITIES, BLOCK_T), first + t, tokens)
        tl.debug_barrier()  # a cell need not be read by the thread that wrote it
        surplus, places = _places(union, target)
        for bit in range(32):
            candidate = threshold | (top >> bit)
            below = 0
            for first in range(0, tokens, BLOCK_T):
                marked, priority = _parked(row, first + t, tokens)
                key, _ = _compete(marked, priority, surplus, first + t, tokens)
                below += tl.sum((key < candidate).to(tl.int32), 0)
            threshold = tl.where(below < places, candidate, threshold)
            smaller = tl.where(below < places, below, smaller)
        certain_before = 0
        tied_before = 0
        for first in range(0, tokens, BLOCK_T):
            marked, priority = _parked(row, first + t, tokens)
            certain, tied = _choose(marked, priority, surplus, threshold, first + t, tokens)
            # Overwrites what was read: the prefix sum in between waits for every thread's part of the tile.
            _store(
                row, ids_keep_ptr, certain, tied, certain_before, tied_before, places - smaller,
                first + t, tokens, KEEP_CHOSEN,
            )  # fmt: skip
            certain_before += tl.sum(certain, 0)
            tied_before += tl.sum(tied, 0)
    else:
        marked = _marks(stream, blocks, 0, BLOCK_T, HAS_BLOCKS)
        priority = _draws(stream, 0, _PRIORITIES, BLOCK_T)
        surplus, places = _places(tl.sum(marked, 0), target)
        key, _ = _compete(marked, priority, surplus, t, tokens)
        for bit in range(32):
            candidate = threshold | (top >> bit)
            below = tl.sum((key < candidate).to(tl.int32), 0)
            # A bit is in the threshold when the places are not filled below it.
            threshold = tl.where(below < places, candidate, threshold)
            smaller = tl.where(below < places, below, smaller)
        certain, tied = _choose(marked, priority, surplus, threshold, t, tokens)
        _store(row, ids_keep_ptr, certain, tied, 0, 0, places - smaller, t, tokens, KEEP_CHOSEN)


@triton.jit
def _row_stream(id_ptr, m, seed_ptr, seed_low, seed_high, epoch_ptr, epoch):
    """What all counters of a row share: (c0, c1, c2, m's part of c3, k0, k1), uint32 scalars."""
    sample = tl.load(id_ptr)
    k0, k1 = load_key(seed_ptr, seed_low, seed_high)
    c2 = (tl.load(epoch_ptr) if epoch_ptr is not None else epoch).to(tl.uint32)
    return sample.to(tl.uint32), (sample >> 32).to(tl.uint32), c2, m << 18, k0, k1


@triton.jit
def _draws(stream, first, PURPOSE: tl.constexpr, COUNT: tl.constexpr):
    """[COUNT] uint32: draws first, first + 1, ... of the row; first and COUNT are multiples of 4."""
    c0, c1, c2, clone, k0, k1 = stream
    index = first // 4 + tl.arange(0, COUNT // 4)
    c3 = (index | clone | (PURPOSE << 30)).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)  # [COUNT // 4] each, draws 4 index + 0, 1, 2, 3
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _marks(stream, blocks, first, BLOCK_T: tl.constexpr, HAS_BLOCKS: tl.constexpr):
    """[BLOCK_T] int32: 1 where a block covers cell first, first + 1, ..."""
    WORDS: tl.constexpr = BLOCK_T // _CELLS
    if not HAS_BLOCKS:
        return tl.zeros((BLOCK_T,), tl.int32)
    height, width, centres, block_height, block_width = blocks
    begin = first + tl.arange(0, WORDS)[None, :] * _CELLS
    words = tl.zeros((_CELLS, WORDS), tl.int32)
    for drawn in range(0, centres, _CELLS):
        # [CELLS]: one value per centre
        cell = tl.umulhi(_draws(stream, drawn, _CENTRES, _CELLS), (height * width).to(tl.uint32)).to(tl.int32)
        exists = drawn + tl.arange(0, _CELLS) < centres
        top = cell // width - block_height // 2
        left = cell % width - block_width // 2
        run_left, run_right = tl.maximum(left, 0), tl.minimum(left + block_width, width)
        for down in range(block_height):
            y = top + down
            inside = exists & (y >= 0) & (y < height)
            start = tl.where(inside, y * width + run_left, 0)
            end = tl.where(inside, y * width + run_right, 0)
            # [CELLS, WORDS]: the run clipped to each word
            low = tl.minimum(tl.maximum(start[:, None] - begin, 0), _CELLS)
            high = tl.minimum(tl.maximum(end[:, None] - begin, 0), _CELLS)
            words |= (1 << high) - (1 << low)
    word = tl.reduce_or(words, 0)
    return tl.reshape((word[:, None] >> tl.arange(0, _CELLS)[None, :]) & 1, (BLOCK_T,))


@triton.jit
def _places(union, target):
    """Whether the union fills the target, and how many places its cells (else the others) compete for."""
    surplus = (union >= target).to(tl.int32)
    return surplus, tl.where(surplus > 0, target, target - union)


@triton.jit
def _compete(marked, priority, surplus, t, tokens):
    """Priorities of the cells that compete (of the others the largest word), and which do."""
    competes = (marked == surplus) & (t < tokens)
    return tl.where(competes, priority, 0xFFFFFFFF), competes


@triton.jit
def _choose(marked, priority, surplus, threshold, t, tokens):
    """Cells that are in, and those of the threshold's priority, some of which are: 0 or 1 each."""
    key, competes = _compete(marked, priority, surplus, t, tokens)
    certain = (key < threshold) | (marked > surplus)
    return certain.to(tl.int32), (competes & (priority == threshold)).to(tl.int32)


@triton.jit
def _store(
    row,
    ids_keep_ptr,
    certain,
    tied,
    certain_before,
    tied_before,
    wanted,
    t,
    tokens,
    KEEP_CHOSEN: tl.constexpr,
):
    """The plan at cells t, before which there are `_before` cells; the first `wanted` of the tied are in."""
    mask_ptr, slot_ptr = row
    # Both counts in one prefix sum: within a tile they fit 16 bits.
    upto = tl.cumsum(certain | (tied << 16), 0)
    tied_upto = tied_before + (upto >> 16)
    chosen = certain | tl.where(tied_upto <= wanted, tied, 0)
    chosen_upto = certain_before + (upto & 0xFFFF) + tl.minimum(tied_upto, wanted)
    if KEEP_CHOSEN:
        keep = chosen
        place = chosen_upto - 1
    else:
        keep = 1 - chosen
        place = t - chosen_upto
    inside = t < tokens
    tl.store(mask_ptr + t, (1 - keep).to(tl.uint8), mask=inside)
    tl.store(slot_ptr + t, tl.where(keep > 0, place, -1), mask=inside)
    tl.store(ids_keep_ptr + place, t, mask=inside & (keep > 0))


@triton.jit
def _park(row, marked, priority, t, tokens):
    """Leave marks and priorities of cells t in the row's mask and slot."""
    mask_ptr, slot_ptr = row
    tl.store(mask_ptr + t, marked.to(tl.uint8), mask=t < tokens)
    tl.store(slot_ptr + t, priority.to(tl.int32, bitcast=True), mask=t < tokens)


@triton.jit
def _parked(row, t, tokens):
    """Marks and priorities of cells t, as `_park` left them."""
    mask_ptr, slot_ptr = row
    marked = tl.load(mask_ptr + t, mask=t < tokens, other=0).to(tl.int32)
    return marked, tl.load(slot_ptr + t, mask=t < tokens, other=0).to(tl.uint32, bitcast=True)


def _run(
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
    mask, ids_keep, slot = MASKS_FWD.outputs(
        ids, seed, epoch, words, clones, grid, block, centres, target, keep_chosen
    )
    rows, tokens = mask.shape
    tiled = tokens > REGISTER_TOKENS
    block_t = TILE if tiled else max(64, triton.next_power_of_2(tokens))
    unit = 4 if tokens % 4 == 0 else 1
    bucket = "tiled" if tiled else power_of_two_bucket(T=block_t)
    config = choose("masks_fwd_kernel", bucket, _candidates(block_t, tiled))
    launch(
        masks_fwd_kernel,
        (rows,),
        ids,
        seed,
        epoch,
        mask.view(torch.uint8),
        slot,
        ids_keep,
        ids.stride(0),
        *as_signed(words),
        clones,
        tokens // unit,
        *grid,
        centres,
        target,
        *block,
        UNIT=unit,
        BLOCK_T=block_t,
        HAS_BLOCKS=centres > 0,
        KEEP_CHOSEN=keep_chosen,
        TILED=tiled,
        fp_fusion=False,
        **config,
    )
    return mask, ids_keep, slot


def _candidates(block_t: int, tiled: bool) -> list[dict[str, int]]:
    """One warp where it holds a row: it counts without a barrier. Beyond that at most 16 cells a thread."""
    if tiled:
        return [{"num_warps": 16, "num_stages": 1}]
    default = 1 if block_t <= 512 else max(4, block_t // 512)
    others = [warps for warps in (1, 2, 4, 8, 16) if warps != default and 64 <= block_t // warps <= 512]
    return [{"num_warps": warps, "num_stages": 1} for warps in (default, *others)]


inverse_block_mask, span_mask, random_mask = samplers_of(MASKS_FWD.triton(_run))
