"""Run `kernels/_common.py` on arrays: ``python interpret_common.py IN.npz OUT.npz cpu|cuda``.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported. Used by test_kernels_common.py.
"""

import sys

import numpy as np
import torch
import triton
import triton.language as tl

from d2vkern.kernels._common import _cos_sin, _radius, gelu, gelu_grad, normals, philox

BLOCK = 1024
LARGE = 1 << 20
UNIFORMS = 1 << 24


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


@triton.jit
def normals_kernel(words_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """words: [4, size]; out: [4, size] fp32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    w0 = tl.load(words_ptr + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    w1 = tl.load(words_ptr + size + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    w2 = tl.load(words_ptr + 2 * size + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    w3 = tl.load(words_ptr + 3 * size + at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    n0, n1, n2, n3 = normals(w0, w1, w2, w3)
    tl.store(out_ptr + at, n0, mask=inside)
    tl.store(out_ptr + size + at, n1, mask=inside)
    tl.store(out_ptr + 2 * size + at, n2, mask=inside)
    tl.store(out_ptr + 3 * size + at, n3, mask=inside)


@triton.jit
def polar_kernel(radius_ptr, cosine_ptr, sine_ptr, BLOCK: tl.constexpr):
    """Every radius and angle that a normal can have: [2^24] each, by the upper 24 bits of the word."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cosine, sine = _cos_sin(k.to(tl.float32) * 3.7450704e-07)
    tl.store(radius_ptr + k, _radius((k + 1).to(tl.uint32)))
    tl.store(cosine_ptr + k, cosine)
    tl.store(sine_ptr + k, sine)


def main(source: str, target: str, device: str) -> None:
    arrays = np.load(source)
    x = torch.from_numpy(arrays["x"]).to(device)
    y, dy = torch.empty_like(x), torch.empty_like(x)
    gelu_kernel[(triton.cdiv(len(x), BLOCK),)](x, y, dy, len(x), BLOCK=BLOCK)
    words = torch.from_numpy(arrays["words"].view(np.int32)).to(device)
    count = words.shape[1]
    draws = torch.empty(4, count, dtype=torch.int32, device=device)
    philox_kernel[(triton.cdiv(count, BLOCK),)](words, draws, count, BLOCK=BLOCK)
    normal = torch.empty(4, count, device=device)
    normals_kernel[(triton.cdiv(count, BLOCK),)](draws, normal, count, BLOCK=BLOCK, enable_fp_fusion=False)
    polar = torch.empty(3, UNIFORMS, device=device)
    large = LARGE if device == "cpu" else BLOCK
    polar_kernel[(UNIFORMS // large,)](*polar, BLOCK=large, enable_fp_fusion=False)
    results = {"gelu": y, "gelu_grad": dy, "draws": draws, "normals": normal, "polar": polar}
    arrays = {name: result.cpu().numpy() for name, result in results.items()}
    arrays["draws"] = arrays["draws"].view(np.uint32)
    np.savez(target, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
