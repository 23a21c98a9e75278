"""Triton helpers shared by the kernels: GELU in few instructions, Philox 4x32-10, normals from it.

GELU. x * Phi(x) with Phi from erfc by Abramowitz & Stegun 7.1.26 in |x|: for q = Phi(-|x|),

    q = exp(-x^2 / 2) / 2 * (a1 t + a2 t^2 + ... + a5 t^5),   t = 1 / (1 + 0.2316419 |x|),

where 0.2316419 is the book's 0.3275911 / sqrt(2), and GELU(x) = max(x, 0) - |x| q. The reciprocal is a
squared rsqrt, one instruction instead of a division. 16 instructions per element where `tl.erf` takes 34, at
the error of fp32 erf (4e-7); this keeps elementwise passes bound by memory. Inputs are fp32 and finite. The
derivative Phi(x) + x phi(x) shares the exponential. The tanh form x (1 + tanh u) / 2 is x / (1 + exp(-2 u)),
u = sqrt(2 / pi) (x + 0.044715 x^3), without the cancellation of 1 + tanh u below 0.

Philox. The counter-based generator of Salmon et al. (SC 2011), the same bits as `csrc/philox.cuh` and
`d2vkern.reference.philox`.

Normals. Box-Muller as the reference defines it, written out: the hardware's approximations are far off where
ln, cos and sin are near 0 (lg2.approx by 2^-22 and sin.approx by 2^-20.5, absolutely). ln u is taken as
e ln 2 + ln(1 + f) with -1/3 <= f < 1/3, an angle less its nearest multiple of pi / 2, which has three parts.
Arguments are such that no special cases exist. Polynomials and constants are those of CUDA's logf (times -2)
and sinf; cos has a new minimax fit, since CUDA's is 2 ulp from torch's CPU version at 20 angles.
Each radius, cosine and sine is within 1 ulp of torch's on a CPU and of what CUDA's functions compute, hence
each normal within 4 ulp, of its own magnitude, however small. The tests try all 2^24 radii and angles.
The operations are IEEE ones and explicit fused multiply-adds, so with FP fusion off the interpreter and GPUs
make the same bits; the exception is an rsqrt, whose error of 2^-22.9 the following Newton step turns into
1 ulp at a few of the 2^24 radii.
"""

from collections.abc import Sequence

import triton
import triton.language as tl


@triton.jit
def not_below_zero(x):
    """max(x, 0) that leaves NaN what it is: `tl.maximum` would make it 0."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def gelu(x):
    """GELU(x), exact form; x is an fp32 block."""
    size = tl.abs(x)
    tail, _ = normal_tail(x, size)
    return tl.maximum(x, 0.0) - size * tail


@triton.jit
def gelu_grad(x):
    """d GELU(x) / dx; x is an fp32 block."""
    tail, bell = normal_tail(x, tl.abs(x))
    # bell / sqrt(2 pi) is the normal density.
    return tl.where(x < 0, tail, 1.0 - tail) + x * bell * 0.3989422804014327


@triton.jit
def gelu_and_grad(x, TANH: tl.constexpr):
    """GELU(x), exact or the tanh form, and its derivative, with one exponential between them."""
    if TANH:
        gate, odds = tanh_gate(x)
        # x d(2 u) / dx = 2 sqrt(2 / pi) (x + 3 * 0.044715 x^3)
        rise = x * (1.5957691216057308 + 0.21406444881780073 * x * x)
        return x * gate, gate + odds * gate * gate * rise
    else:
        size = tl.abs(x)
        tail, bell = normal_tail(x, size)
        # bell / sqrt(2 pi) is the normal density.
        slope = tl.where(x < 0, tail, 1.0 - tail) + x * bell * 0.3989422804014327
        return tl.maximum(x, 0.0) - size * tail, slope


@triton.jit
def tanh_gate(x):
    """g = 1 / (1 + exp(-2 u)) and (1 - g) / g: GELU's tanh form is x g; x is an fp32 block."""
    # 2 sqrt(2 / pi) log2(e) = 2.302208198
    exponent = x * (-2.302208198 - 0.10294324 * x * x)
    odds = tl.exp2(tl.minimum(exponent, 126.0))
    return 1.0 / (1.0 + odds), odds


@triton.jit
def normal_tail(x, size):
    """Phi(-|x|) and exp(-x^2 / 2); size is |x|."""
    # exp(-x^2 / 2) as 2 to the power of -x^2 * log2(e) / 2.
    bell = tl.exp2(x * x * -0.7213475204444817)
    root = tl.rsqrt(1.0 + 0.2316419 * size)
    t = root * root
    series = 1.061405429 * t - 1.453152027
    series = series * t + 1.421413741
    series = series * t - 0.284496736
    series = series * t + 0.254829592
    return 0.5 * bell * series * t, bell


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four output words of a 128-bit counter under a 64-bit key; all are uint32 blocks or scalars."""
    factor0, factor1 = _word(0xD2511F53), _word(0xCD9E8D57)
    step0, step1 = _word(0x9E3779B9), _word(0xBB67AE85)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, factor0), c0 * factor0
        high1, low1 = tl.umulhi(c2, factor1), c2 * factor1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += step0
        k1 += step1
    return c0, c1, c2, c3


@triton.jit
def load_key(seed_ptr, seed_low, seed_high):
    """Both words of a seed: of the int64 at the pointer, or where that is None of those from `as_signed`."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    else:
        return seed_low.to(tl.uint32), seed_high.to(tl.uint32)


def as_signed(words: Sequence[int]) -> list[int]:
    """32-bit words as signed integers: one type of argument, one compilation."""
    return [(word ^ 0x80000000) - 0x80000000 for word in words]


@triton.jit
def normals(w0, w1, w2, w3):
    """Four standard normals from the words of one counter, fp32 (reference: `philox.normal`)."""
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def _normal_pair(a, b):
    """r cos phi and r sin phi: the radius from word a, the angle from word b."""
    radius = _radius((a >> 8) + 1)
    cosine, sine = _cos_sin((b >> 8).to(tl.float32) * 3.7450704e-07)
    return cosine * radius, sine * radius


@triton.jit
def _radius(k):
    """sqrt(-2 ln(k / 2^24)) of uint32 k, 1 .. 2^24."""
    bits = k.to(tl.float32).to(tl.int32, bitcast=True)
    # The exponent e of k / 2^24 = 2^e (1 + f) in place, 1 + f in [2/3, 4/3); 0x4B2AAAAB is 2/3 * 2^24.
    exponent = (bits - 0x4B2AAAAB) & -0x800000
    f = (bits - exponent - (24 << 23)).to(tl.float32, bitcast=True) - 1.0
    # -2 ln(1 + f)
    p = tl.fma(f, 0.26037714, -0.2816922)
    p = tl.fma(p, f, 0.24297255)
    p = tl.fma(p, f, -0.2796122)
    p = tl.fma(p, f, 0.3336847)
    p = tl.fma(p, f, -0.400246)
    p = tl.fma(p, f, 0.49999338)
    p = tl.fma(p, f, -0.66666365)
    p = tl.fma(p, f, 1.0)
    p = tl.fma(p * f, f, -2.0 * f)
    square = tl.fma(exponent.to(tl.float32), -1.6525917e-07, p)  # -2 ln 2 / 2^23
    inverse = tl.rsqrt(tl.maximum(square, 1e-30))  # 0 at k = 2^24; the smallest other square is 1.2e-7
    root = square * inverse
    return tl.fma(tl.fma(-root, root, square), 0.5 * inverse, root)


@triton.jit
def _cos_sin(angle):
    """cos and sin of fp32 angles in [0, 2 pi)."""
    # Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
    shifted = tl.fma(angle, 0.63661975, 12582912.0)
    turns = shifted - 12582912.0
    quarter = shifted.to(tl.uint32, bitcast=True)
    r = tl.fma(turns, -1.5707963, angle)
    r = tl.fma(turns, -7.5497894e-08, r)
    r = tl.fma(turns, -5.390303e-15, r)
    square = r * r
    s = tl.fma(square, -0.00019574659, 0.008332703)
    s = tl.fma(s, square, -0.16666663)
    s = tl.fma(s, square * r, r)
    c = tl.fma(square, 2.4383566e-05, -0.0013886682)
    c = tl.fma(c, square, 0.04166662)
    c = tl.fma(c, square, -0.5)
    c = tl.fma(c, square, 1.0)
    odd = (quarter & 1) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    return _flip(cosine, quarter + 1), _flip(sine, quarter)


@triton.jit
def _flip(x, quarter):
    """x, negated where bit 1 of `quarter` is set."""
    sign = (quarter << 30) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _word(value: tl.constexpr):
    return tl.full((), value, tl.uint32)
