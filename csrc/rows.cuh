// Rows of D columns in accesses of kVector elements: 16 bytes where every address, row and stride is a multiple of 16,
// single elements otherwise.
#pragma once

#include <type_traits>

#include "launch.cuh"
#include "vectors.cuh"

namespace d2v {

struct Fp16 {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Fp16 x) { return float_of_fp16(x.bits); }
__device__ __forceinline__ float to_float(Bf16 x) { return float_of_bf16(x.bits); }

template <class T>
__device__ __forceinline__ T rounded(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, Fp16>) {
    return {fp16_of(x)};
  } else {
    return {bf16_of(x)};
  }
}

// kVector neighbouring elements in registers. 16-bit ones stay two to a register, as they are in memory.
template <class T, int32_t kVector, bool kPairs = sizeof(T) == 2 && kVector % 2 == 0>
struct alignas(sizeof(T) * kVector) Vector {
  T element[kVector];

  __device__ __forceinline__ float get(int32_t i) const { return to_float(element[i]); }
  __device__ __forceinline__ void set(const float (&x)[kVector]) {
#pragma unroll
    for (int32_t i = 0; i < kVector; ++i) element[i] = rounded<T>(x[i]);
  }
};

template <class T, int32_t kVector>
struct alignas(sizeof(T) * kVector) Vector<T, kVector, true> {
  uint32_t pair[kVector / 2];

  __device__ __forceinline__ float get(int32_t i) const {
    return to_float(T{static_cast<uint16_t>(i % 2 == 0 ? pair[i / 2] & 0xFFFFu : pair[i / 2] >> 16)});
  }
  __device__ __forceinline__ void set(const float (&x)[kVector]) {
#pragma unroll
    for (int32_t i = 0; i < kVector; i += 2) {
      pair[i / 2] = rounded<T>(x[i]).bits | static_cast<uint32_t>(rounded<T>(x[i + 1]).bits) << 16;
    }
  }
};

template <class T, int32_t kVector>
__device__ __forceinline__ Vector<T, kVector> load(const T* row, int32_t vector) {
  return reinterpret_cast<const Vector<T, kVector>*>(row)[vector];
}

template <class T, int32_t kVector>
__device__ __forceinline__ void store(T* row, int32_t vector, const Vector<T, kVector>& x) {
  reinterpret_cast<Vector<T, kVector>*>(row)[vector] = x;
}

// The sum, rounded to the dtype of both.
template <class T, int32_t kVector>
__device__ __forceinline__ Vector<T, kVector> add(const Vector<T, kVector>& a, const Vector<T, kVector>& b) {
  float sums[kVector];
#pragma unroll
  for (int32_t i = 0; i < kVector; ++i) sums[i] = a.get(i) + b.get(i);
  Vector<T, kVector> sum;
  sum.set(sums);
  return sum;
}

template <class T, int32_t kVector>
__device__ __forceinline__ Vector<T, kVector> zeros() {
  const float none[kVector] = {};
  Vector<T, kVector> x;
  x.set(none);
  return x;
}

// Vectors of a row that a lane has under way at once: four are a row of 768 16-bit elements and more.
constexpr int32_t kUnroll = 4;

// Copies a row by one warp; a null source is a row of zeros.
template <class T, int32_t kVector>
__device__ __forceinline__ void copy_row(T* out, const T* source, int32_t width) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp, vectors = width / kVector;
  for (int32_t begin = lane; begin < vectors; begin += kUnroll * kWarp) {
    Vector<T, kVector> x[kUnroll];
#pragma unroll
    for (int32_t i = 0; i < kUnroll; ++i) {
      const int32_t c = begin + i * kWarp;
      x[i] = source != nullptr && c < vectors ? load<T, kVector>(source, c) : zeros<T, kVector>();
    }
#pragma unroll
    for (int32_t i = 0; i < kUnroll; ++i) {
      const int32_t c = begin + i * kWarp;
      if (c < vectors) store<T, kVector>(out, c, x[i]);
    }
  }
}

}  // namespace d2v
