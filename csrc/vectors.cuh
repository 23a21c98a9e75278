// Codes of dtypes, 16-bit floats, and how wide an access may be.
//
// GPUs load and store at most 16 bytes per thread at once, and only where the address is a multiple of the width.
#pragma once

#include "host_device.cuh"

namespace d2v {

// Codes of dtypes in pointer tables; kNone: there is no such tensor. Scalars may also be fp64.
constexpr int32_t kNone = 0, kFp32 = 1, kFp16 = 2, kBf16 = 3, kFp64 = 4;

// Bytes of an element.
D2V_HOST_DEVICE constexpr int32_t item_of(int32_t code) { return code == kFp32 ? 4 : 2; }

// The widest access, in bytes, that divides all addresses, row sizes and strides (in bytes) or'ed into `places`.
D2V_HOST_DEVICE int32_t widest_access(uint64_t places) {
  const uint64_t lowest = (places | 16u) & (~(places | 16u) + 1u);
  return static_cast<int32_t>(lowest);
}

// Whether four neighbouring elements of the tensor at `address` can be one access.
D2V_HOST_DEVICE bool takes_fours(uint64_t address, int32_t code) {
  return code == kNone || address % (4u * static_cast<uint32_t>(item_of(code))) == 0;
}

D2V_HOST_DEVICE float float_of_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

D2V_HOST_DEVICE float float_of_fp16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, size = bits & 0x7FFFu;
  // Subnormals are multiples of 2^-24; infinity and NaN have all exponent bits set.
  const uint32_t normal = (size << 13) + (size >= 0x7C00u ? 0x70000000u : 0x38000000u);
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f);
  return float_of(sign | (size < 0x0400u ? subnormal : normal));
#endif
}

// To nearest, ties to even. Of a NaN only that it is one is kept.
D2V_HOST_DEVICE uint16_t bf16_of(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
#endif
}

// To nearest, ties to even; from 65520 on infinity. Of a NaN only that it is one is kept.
D2V_HOST_DEVICE uint16_t fp16_of(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, size = bits_of(x) & 0x7FFFFFFFu;
  const uint32_t normal = (size - 0x38000000u + 0x0FFFu + ((size >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 rounds to a multiple of 2^-24 and leaves it in the low bits.
  const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - 0x3F000000u;
  const uint32_t finite = size < 0x38800000u ? subnormal : normal;
  const uint32_t large = size > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return static_cast<uint16_t>(sign | (size >= 0x477FF000u ? large : finite));
#endif
}

}  // namespace d2v
