"""Scatter of kept tokens among noise or mask tokens: the kernels of `scatter_tokens`; see gather.py."""

import triton
import triton.language as tl
from torch import Tensor

from d2vkern.functions.gather import MASK_TOKEN_BWD, SCATTER_BWD, SCATTER_FWD
from d2vkern.kernels._column_sums import column_sums, new_partials, parts_of
from d2vkern.kernels._common import as_signed, load_key, normals, philox
from d2vkern.kernels._launch import launch
from d2vkern.kernels._tuning import choose, power_of_two_bucket
from d2vkern.kernels.gather_fwd import chunk_of, columns, dense_columns, grid, pick, program, tiles
from d2vkern.reference.philox import NOISE

PLACES_PER_SUM = 64
"""places that a partial sum of the mask token's gradient covers, at least"""
_NOISE = tl.constexpr(NOISE)


# A new seed and counts that change from batch to batch compile nothing anew.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "rows", "tokens", "extras"])
def scatter_fwd_kernel(
    x_ptr,  # [N, E + K, D]
    slot_ptr,  # [N, T] int32
    seed_ptr,  # [] int64; None: seed_low and seed_high
    token_ptr,  # [D]; None: noise or 0 at masked places
    out_ptr,  # [N, T, D], or [N, E + T, D]
    seed_low,
    seed_high,
    noise_std,
    rows,
    tokens,
    extras,
    x_stride_n,
    x_stride_s,
    HAS_NOISE: tl.constexpr,
    KEEP_EXTRA: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n, chunk, block = program(WIDTH, BLOCK_D)
    if n >= rows:
        return
    dtype = out_ptr.dtype.element_ty
    d, inside = columns(chunk, WIDTH, BLOCK_D)
    k0, k1 = load_key(seed_ptr, seed_low, seed_high)
    # [BLOCK_D / 4 / COUNTERS]: the 16 bytes of an access take COUNTERS neighbouring counters
    COUNTERS: tl.constexpr = 32 // dtype.primitive_bitwidth
    c0 = (chunk * (BLOCK_D // 4) + COUNTERS * tl.arange(0, BLOCK_D // 4 // COUNTERS)).to(tl.uint32)
    c2, c3 = n.to(tl.uint32), tl.full((), _NOISE << 30, tl.uint32)
    n = n.to(tl.int64)
    x_ptr += n * x_stride_n
    slot_ptr += n * tokens
    length = extras + tokens if KEEP_EXTRA else tokens
    out_ptr += n * length * WIDTH
    first = block * BLOCK_T
    count = tl.minimum(length - first, BLOCK_T)
    if KEEP_EXTRA:
        for i in range(0, tl.minimum(extras - first, BLOCK_T)):
            s = (first + i).to(tl.int64)
            extra = tl.load(x_ptr + s * x_stride_s + d, mask=inside, other=0.0)
            tl.store(out_ptr + s * WIDTH + d, extra, mask=inside)
        # the tokens of this block of E + T rows
        out_ptr += extras.to(tl.int64) * WIDTH
        count -= tl.maximum(tl.minimum(extras - first, BLOCK_T), 0)
        first = tl.maximum(first - extras, 0)
    if token_ptr is not None:
        token = tl.load(token_ptr + d, mask=inside, other=0.0)
    slot = tl.load(slot_ptr + first)
    for i in range(0, count):
        t = first + i
        next_slot = tl.load(slot_ptr + tl.minimum(t + 1, tokens - 1))
        # [BLOCK_D]
        into = out_ptr + t.to(tl.int64) * WIDTH + d
        if slot >= 0:
            source = x_ptr + (slot + extras).to(tl.int64) * x_stride_s + d
            tl.store(into, tl.load(source, mask=inside, other=0.0), mask=inside)
        elif token_ptr is not None:
            tl.store(into, token, mask=inside)
        elif HAS_NOISE:
            n0, n1, n2, n3 = normals(*philox(c0, t.to(tl.uint32), c2, c3, k0, k1))
            if COUNTERS == 2:
                m0, m1, m2, m3 = normals(*philox(c0 + 1, t.to(tl.uint32), c2, c3, k0, k1))
                n0, n1 = tl.interleave(n0, m0), tl.interleave(n1, m1)
                n2, n3 = tl.interleave(n2, m2), tl.interleave(n3, m3)
            noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
            tl.store(into, (noise * tl.cast(noise_std, tl.float32)).to(dtype), mask=inside)
        else:
            tl.store(into, tl.zeros([BLOCK_D], dtype), mask=inside)
        slot = next_slot


def forward(
    x: Tensor,
    slot: Tensor,
    extras: int,
    noise_std: float,
    seed: Tensor | None,
    words: list[int],
    mask_token: Tensor | None = None,
    keep_extra: bool = False,
) -> Tensor:
    out = SCATTER_FWD.outputs(x, slot, extras, noise_std, seed, words, mask_token, keep_extra)
    (rows, tokens), (_, length, width) = slot.shape, out.shape
    x = dense_columns(x)
    bucket = power_of_two_bucket(rows=rows * tokens, width=width, bytes=x.element_size())
    candidates = [{"BLOCK_T": size, "num_warps": 1, "num_stages": 1} for size in (16, 8, 32)]
    config = choose("scatter_fwd_kernel", bucket, candidates)
    chunk = chunk_of(width)
    launch(
        scatter_fwd_kernel,
        grid(rows, length, config["BLOCK_T"], width, chunk),
        x,
        slot.contiguous(),
        seed,
        dense_columns(mask_token),
        out,
        *as_signed(words),
        float(noise_std),
        rows,
        tokens,
        extras,
        *x.stride()[:2],
        HAS_NOISE=noise_std > 0,
        KEEP_EXTRA=keep_extra,
        WIDTH=width,
        BLOCK_D=chunk,
        fp_fusion=False,
        **config,
    )
    return out


def backward(dout: Tensor, ids_keep: Tensor, extras: int, dextra: Tensor | None = None) -> Tensor:
    dx = SCATTER_BWD.outputs(dout, ids_keep, extras, dextra)
    pick(dx, dout, ids_keep, 1, dextra)
    return dx


@triton.jit(do_not_specialize=["places", "tokens", "each"])
def mask_token_bwd_kernel(
    dout_ptr,  # [N, T, D]
    slot_ptr,  # [N * T] int32
    sums_ptr,  # [programs of a chunk, D] fp32
    places,  # N T
    tokens,
    each,  # places of a program
    dout_stride_n,
    dout_stride_t,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunks: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    part = tl.program_id(0) // chunks
    d, inside = columns(tl.program_id(0) % chunks, WIDTH, BLOCK_D)
    first = part.to(tl.int64) * each
    last = tl.minimum(first + each, places)
    # [BLOCK_R, BLOCK_D]
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        masked = tl.load(slot_ptr + r, mask=r < last, other=0) < 0
        at = r // tokens * dout_stride_n + r % tokens * dout_stride_t
        source = dout_ptr + at[:, None] + d[None, :]
        total += tl.load(source, mask=masked[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(sums_ptr + part.to(tl.int64) * WIDTH + d, tl.sum(total, 0), mask=inside)


def token_backward(dout: Tensor, slot: Tensor) -> Tensor:
    dtoken = MASK_TOKEN_BWD.outputs(dout, slot)
    (rows, tokens), width = slot.shape, dout.shape[2]
    places = rows * tokens
    if places == 0:
        return dtoken.zero_()
    dout = dense_columns(dout)
    bucket = power_of_two_bucket(rows=places, width=width, bytes=dout.element_size())
    config = choose("mask_token_bwd_kernel", bucket, tiles("BLOCK_R", dout.element_size()))
    chunk = chunk_of(width)
    parts = parts_of(places, PLACES_PER_SUM)
    sums = new_partials(dout, parts, (dtoken,))
    launch(
        mask_token_bwd_kernel,
        (parts * triton.cdiv(width, chunk),),
        dout,
        slot.contiguous(),
        sums,
        places,
        tokens,
        triton.cdiv(places, parts),
        *dout.stride()[:2],
        WIDTH=width,
        BLOCK_D=chunk,
        fp_fusion=False,
        **config,
    )
    column_sums(sums, (dtoken,))
    return dtoken
