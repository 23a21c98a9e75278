// Standard normals from Philox words by Box-Muller, and those of the decoder's noise.
//
// The definition is that of d2vkern/reference/philox.py. ln, cos and sin are written out, from IEEE operations and
// explicit fused multiply-adds: hosts and GPUs make the same bits, each radius, cosine and sine is within 1 ulp of
// what torch computes on a CPU, hence each normal within 4 ulp, and a compiler can vectorise a loop over counters
// (nothing branches; g++ wants -mfma and -fno-math-errno for it). ln u is taken as e ln 2 + ln(1 + f) with
// -1/3 <= f < 1/3, an angle less its nearest multiple of pi / 2, which has three parts. Arguments are such that no
// special cases exist. The polynomials are those of kernels/_common.py, which says where they come from; a test
// tries all 2^24 radii and angles.
#pragma once

#include "philox.cuh"

namespace d2v {

struct Normals {
  float first;
  float second;
};

struct Normals4 {
  float v[4];
};

// sqrt(-2 ln(k / 2^24)), k = 1 .. 2^24.
D2V_HOST_DEVICE float radius_of(uint32_t k) {
  const uint32_t bits = bits_of(static_cast<float>(static_cast<int32_t>(k)));
  // The exponent e of k / 2^24 = 2^e (1 + f) in place, 1 + f in [2/3, 4/3); 0x4B2AAAAB is 2/3 * 2^24.
  const uint32_t exponent = (bits - 0x4B2AAAABu) & 0xFF800000u;
  const float f = float_of(bits - exponent - (24u << 23)) - 1.0f;
  // -2 ln(1 + f)
  float p = fmaf(f, 0.26037714f, -0.2816922f);
  p = fmaf(p, f, 0.24297255f);
  p = fmaf(p, f, -0.2796122f);
  p = fmaf(p, f, 0.3336847f);
  p = fmaf(p, f, -0.400246f);
  p = fmaf(p, f, 0.49999338f);
  p = fmaf(p, f, -0.66666365f);
  p = fmaf(p, f, 1.0f);
  p = fmaf(p * f, f, -2.0f * f);
  return sqrtf(fmaf(static_cast<float>(static_cast<int32_t>(exponent)), -1.6525917e-07f, p));  // -2 ln 2 / 2^23
}

// x, negated where bit 1 of `quarter` is set.
D2V_HOST_DEVICE float flip(float x, uint32_t quarter) {
  return float_of(bits_of(x) ^ ((quarter << 30) & 0x80000000u));
}

// cos (first) and sin (second) of an angle in [0, 2 pi).
D2V_HOST_DEVICE Normals cos_sin(float angle) {
  // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
  const float shifted = fmaf(angle, 0.63661975f, 12582912.0f);
  const float turns = shifted - 12582912.0f;
  const uint32_t quarter = bits_of(shifted);
  float r = fmaf(turns, -1.5707963f, angle);
  r = fmaf(turns, -7.5497894e-08f, r);
  r = fmaf(turns, -5.390303e-15f, r);
  const float square = r * r;
  float s = fmaf(square, -0.00019574659f, 0.008332703f);
  s = fmaf(s, square, -0.16666663f);
  s = fmaf(s, square * r, r);
  float c = fmaf(square, 2.4383566e-05f, -0.0013886682f);
  c = fmaf(c, square, 0.04166662f);
  c = fmaf(c, square, -0.5f);
  c = fmaf(c, square, 1.0f);
  const bool odd = (quarter & 1u) != 0;
  return {flip(odd ? s : c, quarter + 1u), flip(odd ? c : s, quarter)};
}

// Two standard normals: the radius from word a, the angle from word b.
D2V_HOST_DEVICE Normals normal_pair(uint32_t a, uint32_t b) {
  constexpr float kTurn = 3.7450704e-07f;  // 2 pi / 2^24 in fp32
  const float radius = radius_of((a >> 8) + 1u);
  const Normals turn = cos_sin(static_cast<float>(static_cast<int32_t>(b >> 8)) * kTurn);
  return {turn.first * radius, turn.second * radius};
}

// The normals of columns 4 d4 .. 4 d4 + 3 of element [n, t] of the decoder's input.
D2V_HOST_DEVICE Normals4 element_normals(uint32_t d4, uint32_t t, uint32_t n, uint32_t k0, uint32_t k1) {
  const Words words = philox(d4, t, n, kNoise << 30, k0, k1);
  const Normals low = normal_pair(words.w[0], words.w[1]), high = normal_pair(words.w[2], words.w[3]);
  return {{low.first, low.second, high.first, high.second}};
}

}  // namespace d2v
