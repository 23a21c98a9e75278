"""Run `kernels/_common.py` on arrays: ``python interpret_common.py IN.npz OUT.npz``.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported. Used by test_kernels_common.py.
"""

import sys

import numpy as np
import torch
import triton
import triton.language as tl
from d2vkern.kernels._common import gelu, gelu_grad, philox

BLOCK = 1024


@triton.jit
def gelu_kernel(x_ptr, y_ptr, dy_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, gelu(x), mask=at < size)
    tl.store(dy_ptr + at, gelu_grad(x), mask=at < size)


@triton.jit
def philox_kernel(words_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """words: [6, size] counter then key; out: [4, size]; uint32 bits in int32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    c0 = tl.load(words_ptr + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    c1 = tl.load(words_ptr + size + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    c2 = tl.load(words_ptr + 2 * size + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    c3 = tl.load(words_ptr + 3 * size + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    k0 = tl.load(words_ptr + 4 * size + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    k1 = tl.load(words_ptr + 5 * size + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    r0, r1, r2, r3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + at, r0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(out_ptr + size + at, r1.to(tl.int32, bitcast=True), mask=inside)
    tl.store(out_ptr + 2 * size + at, r2.to(tl.int32, bitcast=True), mask=inside)
    tl.store(out_ptr + 3 * size + at, r3.to(tl.int32, bitcast=True), mask=inside)


def main(source: str, target: str) -> None:
    arrays = np.load(source)
    x = torch.from_numpy(arrays["x"])
    y, dy = torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(triton.cdiv(len(x), BLOCK),)](x, y, dy, len(x), BLOCK=BLOCK)
    words = torch.from_numpy(arrays["words"].view(np.int32))
    draws = torch.empty(4, words.shape[1], dtype=torch.int32)
    philox_kernel[(triton.cdiv(words.shape[1], BLOCK),)](words, draws, words.shape[1], BLOCK=BLOCK)
    np.savez(target, gelu=y.numpy(), gelu_grad=dy.numpy(), draws=draws.numpy().view(np.uint32))


if __name__ == "__main__":
    main(*sys.argv[1:])
