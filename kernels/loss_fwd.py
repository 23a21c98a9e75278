"""Forward of the masked regression loss in Triton: loss, gradient and both variances (see loss.py).

One program of `loss_fwd_kernel` owns a tile [BLOCK_T, BLOCK_D] of one sample and walks over (16 of) its M
rows. The target's tile stays in registers; programs of one row each would read it M times through L2, at 4
bytes an element against the prediction's 2, which is slower than memory. Predictions are copied to shared
memory STAGES - 1 rows ahead. What a plan says of the tile is read once, as one word of mask bits and one
offset per row: in [N, P, D] the place of token t is the number of masked tokens before it, so that no table
of positions is made for this op.

Every element of the tile keeps the mean and squares (`_moments.py`) of its errors e over the rows; adding the
target gives those of the predictions, relative to the channel's target at the first masked place of row 0, so
that large means cost no digits. With beta = 0 the sum of e^2 is squares + count * mean^2, no cancellation.
`loss_fwd_kernel_finish` merges the moments of all G tiles, BLOCK_D channels a program. Its program 0 also
sums the penalties; the last program to arrive adds up the channels. An integer ticket tells who is last; no
sum depends on it, each has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.kernels._launch import launch
from d2vkern.kernels._moments import add_moments, merge_rows
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket
from d2vkern.reference.loss import split_factor

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]

ROWS = 16
"""most rows of a sample that one program walks over"""
SCAN = 256
"""tokens looked at in one go when the first masked one is searched"""
FINISH: Config = {"BLOCK_G": 32, "BLOCK_D": 32, "BLOCK_P": 512, "num_warps": 4}
_VARIANCE_EPS = tl.constexpr(1e-6)


# Token counts change from batch to batch: nothing is compiled anew when one becomes divisible by 16.
@triton.jit(do_not_specialize=["clones", "tokens", "kept", "tiles", "groups"])
def loss_fwd_kernel(
    pred_ptr,  # [N, T, D], or [N, P, D]
    target_ptr,  # [B, T, D]
    slot_ptr,  # [N, T] int32, contiguous; negative where masked
    kept_ptr,  # [N] int32, kept tokens of each row; None: `kept` of all
    grad_ptr,  # like pred, contiguous; None: not wanted
    moments_ptr,  # [4, G, D] fp32: mean and squares of pred, of target
    count_ptr,  # [G] fp32, masked places of a tile
    penalty_ptr,  # [G * chunks of D] fp32
    ticket_ptr,  # [] int32, set to 0 for the kernel that follows
    pred_stride_n,
    pred_stride_t,
    target_stride_b,
    target_stride_t,
    grad_stride_n,
    width,
    clones,
    tokens,
    kept,
    tiles,  # of a sample
    groups,  # G, tiles of all samples
    slope,
    beta,
    EVERY_TOKEN: tl.constexpr,  # pred is [N, T, D]
    SMOOTH: tl.constexpr,  # beta > 0
    BLOCK_T: tl.constexpr,  # 32 at most, a word of mask bits
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunks = tl.cdiv(width, BLOCK_D)
    group = tl.program_id(0) // chunks
    versions = tl.cdiv(clones, BLOCK_M)
    version = group % versions
    start = group // versions % tiles * BLOCK_T
    sample = (group // versions // tiles).to(tl.int64)
    # [BLOCK_T], [BLOCK_D]
    t = start + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = d < width
    slope = tl.full((), slope, tl.float32)
    beta = tl.full((), beta, tl.float32)

    # [BLOCK_T, BLOCK_D]
    inside = (t < tokens)[:, None] & inside_d[None, :]
    y_ptr = target_ptr + sample * target_stride_b + t.to(tl.int64)[:, None] * target_stride_t + d[None, :]
    y = tl.load(y_ptr, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    # [BLOCK_T]
    count = tl.zeros((BLOCK_T,), tl.float32)
    penalty = tl.zeros((BLOCK_T,), tl.float32)

    rows = tl.minimum(clones - version * BLOCK_M, BLOCK_M)
    first_row = sample * clones + version * BLOCK_M
    if kept_ptr is not None:
        kept_ptr += first_row
    words, befores = _mask_words(
        slot_ptr + first_row * tokens, kept_ptr, rows, start, tokens, kept, EVERY_TOKEN, BLOCK_M, BLOCK_T
    )
    for m in tl.range(0, rows, num_stages=STAGES):
        row = first_row + m
        masked, place = _places(_pick(words, m), _pick(befores, m), start, EVERY_TOKEN, BLOCK_T)
        x = _predictions(pred_ptr + row * pred_stride_n, place, pred_stride_t, masked, d, inside_d)
        wanted = (masked > 0)[:, None] & inside_d[None, :]
        error = tl.where(wanted, x.to(tl.float32) - y, 0.0)
        count, mean, squares = add_moments(count, mean, squares, masked, error, None)
        if SMOOTH:
            size = tl.abs(error)
            clipped = tl.minimum(size, beta)
            penalty += tl.sum(clipped * (size - 0.5 * clipped), 1)
            error = tl.clamp(error, -beta, beta, propagate_nan=tl.PropagateNan.ALL)
        if grad_ptr is not None:
            at = row * grad_stride_n + place.to(tl.int64)[:, None] * width + d[None, :]
            grad = (error * slope).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + at, grad, mask=inside if EVERY_TOKEN else wanted)
    if not SMOOTH:
        penalty = tl.sum(squares + count[:, None] * mean * mean, 1)

    # A token's target counts as often as the token is masked, and may be anything where it never is.
    first = _first_masked(slot_ptr, tokens, BLOCK_SCAN)
    at = tl.minimum(first, tokens - 1) if kept_ptr is not None else first
    reference = tl.load(target_ptr + at * target_stride_t + d, mask=inside_d, other=0.0).to(tl.float32)
    if kept_ptr is not None:
        reference = tl.where(first < tokens, reference, 0.0)
    y = tl.where((count > 0)[:, None] & inside_d[None, :], y - reference[None, :], 0.0)
    total, pred_mean, pred_squares = merge_rows(count, mean + y, squares)
    _, target_mean, target_squares = merge_rows(count, y, tl.zeros_like(y))
    plane = groups.to(tl.int64) * width
    moments_ptr += group.to(tl.int64) * width + d
    tl.store(moments_ptr, pred_mean, mask=inside_d)
    tl.store(moments_ptr + plane, pred_squares, mask=inside_d)
    tl.store(moments_ptr + 2 * plane, target_mean, mask=inside_d)
    tl.store(moments_ptr + 3 * plane, target_squares, mask=inside_d)
    tl.store(penalty_ptr + tl.program_id(0), tl.sum(penalty, 0))
    if tl.program_id(0) % chunks == 0:
        tl.store(count_ptr + group, total)
    if tl.program_id(0) == 0:
        tl.store(ticket_ptr, 0)


@triton.jit
def _first_masked(slot_ptr, tokens, BLOCK_SCAN: tl.constexpr):
    """The first masked token of a row; `tokens` where a padded plan's has none."""
    first = tl.zeros((), tl.int32) + tokens
    start = tl.zeros((), tl.int32)
    while (start < tokens) & (first == tokens):
        t = start + tl.arange(0, BLOCK_SCAN)
        slot = tl.load(slot_ptr + t, mask=t < tokens, other=0)
        first = tl.min(tl.where(slot < 0, t, tokens), 0)
        start += BLOCK_SCAN
    return first.to(tl.int64)


@triton.jit
def _mask_words(
    slot_ptr,  # the first of these rows
    kept_ptr,
    rows,
    start,
    tokens,
    kept,
    EVERY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """[BLOCK_M] uint32: masks of tokens start, start + 1, ... as bits, and int32: masked tokens before them.

    The kept tokens before `start` are the slot of the first kept token from there on. Rows past the last
    have no masked token.
    """
    m = tl.arange(0, BLOCK_M)
    slot_ptr += m.to(tl.int64)[:, None] * tokens + tl.arange(0, BLOCK_T)[None, :]
    bit = tl.arange(0, BLOCK_T)[None, :]
    exists = (m < rows)[:, None]
    slot = tl.load(slot_ptr + start, mask=exists & (start + bit < tokens), other=kept)
    words = tl.sum((slot < 0).to(tl.uint32) << bit.to(tl.uint32), 1)
    if EVERY_TOKEN:
        return words, tl.zeros((BLOCK_M,), tl.int32)
    # [BLOCK_M]; `kept` means none found yet
    found = tl.where(m < rows, tl.min(tl.where(slot < 0, kept, slot), 1), 0)
    t = start + BLOCK_T
    while (t < tokens) & (tl.max(found, 0) == kept):
        slot = tl.load(slot_ptr + t, mask=exists & (t + bit < tokens), other=kept)
        found = tl.minimum(found, tl.min(tl.where(slot < 0, kept, slot), 1))
        t += BLOCK_T
    if kept_ptr is not None:
        own = tl.load(kept_ptr + m, mask=m < rows, other=0)
        found = tl.minimum(found, own)
    return words, start - found


@triton.jit
def _pick(values, index):
    """values[index], or 0 past the end."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0), 0)


@triton.jit
def _places(word, before, start, EVERY_TOKEN: tl.constexpr, BLOCK_T: tl.constexpr):
    """[BLOCK_T]: 1.0 where a word of mask bits is set, and where a token's prediction stands in its row."""
    bit = tl.arange(0, BLOCK_T)
    masked = ((word >> bit.to(tl.uint32)) & 1).to(tl.float32)
    if EVERY_TOKEN:
        return masked, start + bit
    # The bits below one's own, counted in parallel.
    below = word & ((1 << bit.to(tl.uint32)) - 1)
    below -= (below >> 1) & 0x55555555
    below = (below & 0x33333333) + ((below >> 2) & 0x33333333)
    below = (below + (below >> 4)) & 0x0F0F0F0F
    below += below >> 8
    below += below >> 16
    return masked, before + (below & 0x3F).to(tl.int32)


@triton.jit
def _predictions(row_ptr, place, stride_t, masked, d, inside_d):
    """[BLOCK_T, BLOCK_D]: predictions of a row at its masked places, 0 elsewhere."""
    at = place.to(tl.int64)[:, None] * stride_t + d[None, :]
    return tl.load(row_ptr + at, mask=(masked > 0)[:, None] & inside_d[None, :], other=0.0)


@triton.jit(do_not_specialize=["groups", "parts", "total"])
def loss_fwd_kernel_finish(
    moments_ptr,  # [4, G, D] fp32
    count_ptr,  # [G] fp32
    penalty_ptr,  # [parts] fp32
    spread_ptr,  # [2, programs] fp32, sums over a program's channels
    ticket_ptr,  # [] int32
    loss_ptr,  # [] fp32
    pred_var_ptr,  # [] fp32
    target_var_ptr,  # [] fp32
    width,
    groups,
    parts,
    total,  # masked places; None: the sum of the counts
    factor,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    programs = tl.num_programs(0)
    p = tl.arange(0, BLOCK_P)
    if tl.program_id(0) == 0:
        # [BLOCK_P]
        penalty = tl.zeros((BLOCK_P,), tl.float32)
        for start in range(0, parts, BLOCK_P):
            penalty += tl.load(penalty_ptr + start + p, mask=start + p < parts, other=0.0)
        tl.store(loss_ptr, tl.sum(penalty, 0) * tl.full((), factor, tl.float32))

    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    spread = _spread(moments_ptr, count_ptr, d, width, groups, total, BLOCK_G, BLOCK_D)
    tl.store(spread_ptr + tl.program_id(0), spread)
    moments_ptr += 2 * groups.to(tl.int64) * width
    spread = _spread(moments_ptr, count_ptr, d, width, groups, total, BLOCK_G, BLOCK_D)
    tl.store(spread_ptr + programs + tl.program_id(0), spread)
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.debug_barrier()
        tl.store(pred_var_ptr, _sum(spread_ptr, programs, BLOCK_P) / width)
        tl.store(target_var_ptr, _sum(spread_ptr + programs, programs, BLOCK_P) / width)


@triton.jit
def _spread(moments_ptr, count_ptr, d, width, groups, total, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum over channels d of sqrt(unbiased variance + eps), from all groups' moments."""
    # [BLOCK_G], [BLOCK_G, BLOCK_D]
    g = tl.arange(0, BLOCK_G)
    count = tl.zeros((BLOCK_G,), tl.float32)
    mean = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(0, groups, BLOCK_G):
        inside = (start + g < groups)[:, None] & (d < width)[None, :]
        ptr = moments_ptr + (start + g).to(tl.int64)[:, None] * width + d[None, :]
        more = tl.load(count_ptr + start + g, mask=start + g < groups, other=0.0)
        more_mean = tl.load(ptr, mask=inside, other=0.0)
        more_squares = tl.load(ptr + groups.to(tl.int64) * width, mask=inside, other=0.0)
        count, mean, squares = add_moments(count, mean, squares, more, more_mean, more_squares)
    counted, _, squares = merge_rows(count, mean, squares)
    if total is not None:
        counted = total
    variance = squares / tl.maximum(counted - 1, 1).to(tl.float32)
    return tl.sum(tl.where(d < width, tl.sqrt_rn(variance + _VARIANCE_EPS), 0.0), 0)


@triton.jit
def _sum(values_ptr, size, BLOCK: tl.constexpr):
    """Sum of what other programs have written, past this processor's own cache."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + at, mask=at < size, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


def _cost(
    pred: Tensor,
    target: Tensor,
    slot: Tensor,
    masked: int,
    clones: int,
    beta: float,
    scale: float,
    needs_grad: bool,
    kept_lengths: Tensor | None = None,
) -> _costs.Cost:
    ids_mask = slot.new_empty((slot.shape[0], masked), device="meta")
    return _costs.loss(pred, target, ids_mask, grad=(needs_grad,))


def outputs(
    pred: Tensor,
    target: Tensor,
    slot: Tensor,
    masked: int,
    clones: int,
    beta: float,
    scale: float,
    needs_grad: bool,
    kept_lengths: Tensor | None = None,
) -> Outputs:
    """What `forward` returns, unwritten: loss, pred_var, target_var (fp32, 0-dim) and pred's gradient."""
    loss, pred_var, target_var = (pred.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, pred_var, target_var, pred.new_empty(pred.shape if needs_grad else (0,))


@op_range("loss/fwd/triton", _cost)
def forward(
    pred: Tensor,
    target: Tensor,
    slot: Tensor,
    masked: int,
    clones: int,
    beta: float,
    scale: float,
    needs_grad: bool,
    kept_lengths: Tensor | None = None,
) -> Outputs:
    """slot: [N, T], negative where masked; masked: P, masked tokens of every row, of padded ones the most."""
    made = outputs(pred, target, slot, masked, clones, beta, scale, needs_grad)
    (rows, tokens), width = slot.shape, pred.shape[-1]
    if rows * masked * width == 0:
        for output in made:
            output.zero_()
        return made
    loss, pred_var, target_var, grad = made
    # of (N, T, D) and a row that is masked as a whole, all tokens are meant
    every_token = pred.shape[1] != masked or (kept_lengths is not None and masked == tokens)
    if kept_lengths is not None and needs_grad and not every_token:
        grad.zero_()
    pred, target = (x if x.stride(-1) == 1 else x.contiguous() for x in (pred, target))
    bucket = power_of_two_bucket(N=rows, T=tokens, D=width, item=pred.element_size())
    config = choose("loss_fwd_kernel", bucket, _candidates(pred.element_size()))
    tiles = triton.cdiv(tokens, config["BLOCK_T"])
    groups = rows // clones * tiles * triton.cdiv(clones, ROWS)
    parts = groups * triton.cdiv(width, config["BLOCK_D"])
    finishers = triton.cdiv(width, FINISH["BLOCK_D"])
    sizes = ((4, groups, width), (groups,), (parts,), (2, finishers))
    moments, count, penalty, spread = (pred.new_empty(size, dtype=torch.float32) for size in sizes)
    ticket = pred.new_empty((), dtype=torch.int32)
    factor = scale / beta if beta > 0 else scale
    launch(
        loss_fwd_kernel,
        (parts,),
        pred,
        target,
        slot.contiguous(),
        None if kept_lengths is None else kept_lengths.contiguous(),
        grad if needs_grad else None,
        moments,
        count,
        penalty,
        ticket,
        *pred.stride()[:2],
        *target.stride()[:2],
        pred.shape[1] * width,
        width,
        clones,
        tokens,
        tokens if kept_lengths is not None else tokens - masked,
        tiles,
        groups,
        split_factor(beta, scale)[0],
        beta,
        EVERY_TOKEN=every_token,
        SMOOTH=beta > 0,
        BLOCK_M=ROWS,
        BLOCK_SCAN=SCAN,
        **config,
    )
    launch(
        loss_fwd_kernel_finish,
        (finishers,),
        moments,
        count,
        penalty,
        spread,
        ticket,
        loss,
        pred_var,
        target_var,
        width,
        groups,
        parts,
        None if kept_lengths is not None else rows * masked,
        factor,
        **FINISH,
    )
    return made


def _candidates(item: int) -> list[Config]:
    """Tiles for predictions of `item` bytes; 256 bytes are a row's share of one, unless said otherwise."""
    wide = 256 // item
    return [
        {"BLOCK_T": 32, "BLOCK_D": wide, "STAGES": 3, "num_warps": 8},
        {"BLOCK_T": 32, "BLOCK_D": wide, "STAGES": 2, "num_warps": 8},
        {"BLOCK_T": 16, "BLOCK_D": wide, "STAGES": 3, "num_warps": 8},
        {"BLOCK_T": 16, "BLOCK_D": wide, "STAGES": 3, "num_warps": 4},
        {"BLOCK_T": 32, "BLOCK_D": wide // 2, "STAGES": 3, "num_warps": 4},
        {"BLOCK_T": 16, "BLOCK_D": 2 * wide, "STAGES": 3, "num_warps": 8},
        {"BLOCK_T": 32, "BLOCK_D": 2 * wide, "STAGES": 3, "num_warps": 16},
    ]
