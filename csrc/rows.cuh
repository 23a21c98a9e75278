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

template <class T, int32_t kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T element[kVector];
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
  Vector<T, kVector> sum;
#pragma unroll
  for (int32_t i = 0; i < kVector; ++i) sum.element[i] = rounded<T>(to_float(a.element[i]) + to_float(b.element[i]));
  return sum;
}

template <class T, int32_t kVector>
__device__ __forceinline__ Vector<T, kVector> zeros() {
  Vector<T, kVector> x;
#pragma unroll
  for (int32_t i = 0; i < kVector; ++i) x.element[i] = rounded<T>(0.0f);
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
