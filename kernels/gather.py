"""Triton gather_tokens and scatter_tokens: rows copied once between [B, T, D] and [N, E + K, D], n = b M + m.

    gather     out[n, E + k] = (x[b, t] + positions[t]) + per_mask[n, t],  t = ids_keep[n, k]
               out[n, e] = extra[e]; each sum is rounded to the dtype, where eager rounds it
    backward   with g[n, t] = dout[n, E + slot[n, t]] where slot[n, t] >= 0, else 0:
               dx[b, t] = sum over m of g[n, t], in fp32, in the order m = 0 .. M - 1, rounded once
               dper_mask[n, t] = g[n, t]
               dpositions[t], dextra[e] = sums over n, in fp32, in an order that the shapes alone fix
               what ids_keep has -1 for is 0, and no slot leads to it
    scatter    out[n, t] = x[n, E + slot[n, t]] where slot[n, t] >= 0, else noise_std normal(seed, n, t), or
               the mask token; with keep_extra behind x[n, :E]
    backward   a gather from one version per sample, with 0 or their own gradient for the extra tokens; of the
               mask token the sum over the masked places, in fp32, in an order that the shapes alone fix

Layout: contiguous last dimensions and any other strides (what has not is copied first); ids_keep, slot and
all outputs are contiguous.

A program takes a chunk of the columns, 256 where that divides D: a warp moves 512 bytes of a 16-bit row in
16-byte accesses, and no lane is idle at 768, 1024 or 1280.
- gather_fwd_kernel (gather_fwd.py): BLOCK_S rows of one out[n]. The M versions of a sample run next to each
  other, so that x comes from memory once and from the L2 cache M times.
- gather_bwd_kernel_rows (gather_bwd.py): BLOCK_T tokens of one sample, looked up in all M versions: nothing
  is cleared first, no atomics. For dpositions and dextra it goes on to the next samples of its group and
  leaves an fp32 partial sum per group, which a second kernel adds up (_column_sums.py).
- scatter_fwd_kernel (_scatter.py): BLOCK_T tokens of one out[n] by a single warp, one after another. The warp
  copies or draws as a whole, so a kept token costs no normals. One Philox counter makes the normals of four
  neighbouring columns, and a thread makes all that it stores.
- mask_token_bwd_kernel (_scatter.py): a run of the N T places, of which it reads those that are masked;
  leaves an fp32 partial sum for _column_sums.py.

Bytes, in rows of D (the floor: _costs.gather, _costs.scatter); ids_keep or slot come once per chunk on top:
    gather     B T + E + T (positions) + N K (per_mask) read, N (E + K) written: the floor
    backward   N (E + K) read, B T (dx) + N T (dper_mask) written: the floor; partial sums: E fp32 rows per
               sample (dextra), T per 4 samples (dpositions), written and read
    scatter    N K read, N T written: less than the floor by the extra tokens, which are not read
    backward   N K read, N (E + K) written: likewise
The noise is bound by arithmetic: a normal takes 42 issue slots (36 instructions of sm_90, 15 of them Philox).
By that count image_base's 31 M normals take an H200 43 us at B = 16, where its bytes take 21.
"""

from d2vkern.functions import gather as functions
from d2vkern.kernels import _scatter, gather_bwd, gather_fwd

gather_tokens = functions.gather_with(
    functions.GATHER_FWD.triton(gather_fwd.forward), functions.GATHER_BWD.triton(gather_bwd.backward)
)
scatter_tokens = functions.scatter_with(
    functions.SCATTER_FWD.triton(_scatter.forward),
    functions.SCATTER_BWD.triton(_scatter.backward),
    functions.MASK_TOKEN_BWD.triton(_scatter.token_backward),
)
