"""Scatter of kept tokens among noise: the kernel of `scatter_tokens` and its launch; see gather.py."""

import triton
import triton.language as tl
from torch import Tensor

from d2vkern.functions.gather import SCATTER_BWD, SCATTER_FWD
from d2vkern.kernels._common import as_signed, load_key, normals, philox
from d2vkern.kernels._launch import launch
from d2vkern.kernels._tuning import choose, power_of_two_bucket
from d2vkern.kernels.gather_fwd import chunk_of, columns, dense_columns, grid, pick, program
from d2vkern.reference.philox import NOISE

_NOISE = tl.constexpr(NOISE)


# A new seed and counts that change from batch to batch compile nothing anew.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "rows", "tokens", "extras"])
def scatter_fwd_kernel(
    x_ptr,  # [N, E + K, D]
    slot_ptr,  # [N, T] int32
    seed_ptr,  # [] int64; None: seed_low and seed_high
    out_ptr,  # [N, T, D]
    seed_low,
    seed_high,
    noise_std,
    rows,
    tokens,
    extras,
    x_stride_n,
    x_stride_s,
    HAS_NOISE: tl.constexpr,
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
    out_ptr += n * tokens * WIDTH
    first = block * BLOCK_T
    slot = tl.load(slot_ptr + first)
    for i in range(0, tl.minimum(tokens - first, BLOCK_T)):
        t = first + i
        next_slot = tl.load(slot_ptr + tl.minimum(t + 1, tokens - 1))
        # [BLOCK_D]
        into = out_ptr + t.to(tl.int64) * WIDTH + d
        if slot >= 0:
            source = x_ptr + (slot + extras).to(tl.int64) * x_stride_s + d
            tl.store(into, tl.load(source, mask=inside, other=0.0), mask=inside)
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
    x: Tensor, slot: Tensor, extras: int, noise_std: float, seed: Tensor | None, words: list[int]
) -> Tensor:
    out = SCATTER_FWD.outputs(x, slot, extras, noise_std, seed, words)
    rows, tokens, width = out.shape
    x = dense_columns(x)
    bucket = power_of_two_bucket(rows=rows * tokens, width=width, bytes=x.element_size())
    candidates = [{"BLOCK_T": size, "num_warps": 1, "num_stages": 1} for size in (16, 8, 32)]
    config = choose("scatter_fwd_kernel", bucket, candidates)
    chunk = chunk_of(width)
    launch(
        scatter_fwd_kernel,
        grid(rows, tokens, config["BLOCK_T"], width, chunk),
        x,
        slot.contiguous(),
        seed,
        out,
        *as_signed(words),
        float(noise_std),
        rows,
        tokens,
        extras,
        *x.stride()[:2],
        HAS_NOISE=noise_std > 0,
        WIDTH=width,
        BLOCK_D=chunk,
        fp_fusion=False,
        **config,
    )
    return out


def backward(dout: Tensor, ids_keep: Tensor, extras: int) -> Tensor:
    dx = SCATTER_BWD.outputs(dout, ids_keep, extras)
    pick(dx, dout, ids_keep, 1)
    return dx
