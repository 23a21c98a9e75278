"""Which tiles the attention kernels take: the largest whose registers suffice on every target.

All have four warps, the least that wgmma takes; with eight, gfx942 (64 threads to a warp) leaves a thread 256
registers, which are too few. In 16 bits a program owns 64 rows, the least of wgmma, and walks along the other
side in steps of 64 tokens; wide heads (above 64) need half of that for accumulators, and so do dropout's
generator and, in backward, the bias.

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
    if call.item == 4:
        return _config(call, "attention_fwd_kernel", _FP32)
    step = 32 if call.padded_width > 64 or call.dropped else 64
    return _config(call, "attention_fwd_kernel", [_tile(64, step), _tile(64, step // 2)])


def queries_tiles(call: Call) -> Config:
    """For attention_bwd_kernel_queries."""
    if call.item == 4:
        # At one stage sm_100 spills in heads above 64.
        first = _tile(16, 32, stages=2 if call.padded_width > 64 else 1)
        return _config(call, "attention_bwd_kernel_queries", [first, _FP32[0]])
    step = _backward_step(call)
    if call.dropped and call.biased:
        # At two stages sm_100 spills; at one a multiprocessor of sm_90 holds three programs, at three two.
        candidates = [_tile(64, step, stages=1), _tile(64, step, stages=3)]
    else:
        candidates = [_tile(64, step), _tile(64, step // 2) if step > 16 else _tile(64, step, stages=1)]
    return _config(call, "attention_bwd_kernel_queries", candidates)


def keys_tiles(call: Call) -> Config:
    """For attention_bwd_kernel_keys."""
    step = _backward_step(call)
    other = _tile(step // 2, 64) if step > 16 else _tile(step, 64, stages=1)
    # At a step of 32 in wide heads a second stage is too much for sm_80.
    first = _tile(step, 64, stages=1 if step == 32 and call.padded_width > 64 else 2)
    return _config(call, "attention_bwd_kernel_keys", _FP32 if call.item == 4 else [first, other])


def _backward_step(call: Call) -> int:
    """Tokens that backward takes at a time in 16 bits."""
    return 64 >> ((call.padded_width > 64) + (call.dropped or call.biased))


def _tile(queries: int, keys: int, stages: int = 2) -> Config:
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": 4, "num_stages": stages}


_FP32 = [_tile(16, 16, stages=1), _tile(16, 32, stages=1)]


def _config(call: Call, kernel: str, candidates: list[Config]) -> Config:
    bucket = power_of_two_bucket(S=call.tokens, programs=call.sequences * call.heads)
    kind = " alibi" * call.biased + " dropout" * call.dropped
    return choose(kernel, f"{bucket} Dh{call.padded_width} bytes{call.item}{kind}", candidates)
