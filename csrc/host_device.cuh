// What lets a header compile as CUDA and as plain C++.
//
// Bits are the same on both where no compiler contracts a * b + c behind our back: nvcc gets -fmad=false, g++
// -ffp-contract=off, and a fused multiply-add is written fmaf.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define D2V_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Into whatever instruction set the caller is compiled for.
#define D2V_HOST_DEVICE inline __attribute__((always_inline))
#else
#define D2V_HOST_DEVICE inline
#endif

namespace d2v {

D2V_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

D2V_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace d2v
