"""Which tiles the attention kernels take: the largest whose registers suffice on every target.

All have four warps, the least that wgmma takes; with eight, gfx942 (64 threads to a warp) leaves a thread 256
registers, which are too few. In 16 bits a program owns 64 rows, the least of wgmma, and walks along the other
side in steps of 64 tokens; wide heads (above 64) take half of that for their accumulators, and so do, in
backward, dropout's generator and, in wide heads, the bias. Registers at the widest (all at once, 300 tokens):

    16 bits             sm_80  sm_90  sm_100  gfx942
    forward     Dh 64
                Dh 128
    queries     Dh 64
                Dh 128
    keys        Dh 64
                Dh 128

fp32 has no matrix instructions that are exact: there a thread keeps whole rows of both operands, and the more
of them the larger the tile.
"""

from __future__ import annotations

import triton

from d2vkern.kernels._attention import Call
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket


def short_tiles(call: Call, kernel: str) -> Config:
    """A power of two tokens, at least 16; four warps from 64 on, below which there is no wgmma."""
    block = max(16, triton.next_power_of_2(call.tokens))
    warps = {16: (1, 2), 32: (2, 4), 64: (4, 8)}[block]
    return _config(call, kernel, [{"BLOCK_S": block, "num_warps": some} for some in warps])


def forward_tiles(call: Call) -> Config:
    """For attention_fwd_kernel."""
    wide = call.padded_width > 64
    if call.item == 4:
        candidates = _candidates([(16, 16), (16, 32)] if wide else [(32, 32), (32, 16)], stages=1)
    else:
        step = 32 if wide or call.dropped else 64
        candidates = _candidates([(64, step), (64, step // 2)], stages=2)
    return _config(call, "attention_fwd_kernel", candidates)


def queries_tiles(call: Call) -> Config:
    """For attention_bwd_kernel_queries."""
    if call.item == 4:
        candidates = _candidates([(32, 16), (16, 16)], stages=1, warps=8)
    else:
        candidates = [c for step, n in _steps(call) for c in _candidates([(64, step)], stages=n)]
    return _config(call, "attention_bwd_kernel_queries", candidates)


def keys_tiles(call: Call) -> Config:
    """For attention_bwd_kernel_keys."""
    if call.item == 4:
        candidates = _candidates([(16, 32), (16, 16)], stages=1)
    else:
        steps = _steps(call)
        if call.padded_width > 64 and steps[0][0] == 32:  # a second stage is too much for sm_80
            steps = [(32, 1), (16, 2)]
        candidates = [c for step, n in steps for c in _candidates([(step, 64)], stages=n)]
    return _config(call, "attention_bwd_kernel_keys", candidates)


def _steps(call: Call) -> list[tuple[int, int]]:
    """Tokens that backward takes at a time in 16 bits, and stages; then others to try."""
    wide = call.padded_width > 64
    step = 64 >> (wide + (call.dropped or (wide and call.biased)))
    return [(step, 2), (step // 2, 2) if step > 16 else (step, 1)]


def _candidates(sides: list[tuple[int, int]], stages: int, warps: int = 4) -> list[Config]:
    """sides: of queries and of keys."""
    return [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages} for m, n in sides]


def _config(call: Call, kernel: str, candidates: list[Config]) -> Config:
    bucket = power_of_two_bucket(S=call.tokens, programs=call.sequences * call.heads)
    kind = " alibi" * call.biased + " dropout" * call.dropped
    return choose(kernel, f"{bucket} Dh{call.padded_width} bytes{call.item}{kind}", candidates)
