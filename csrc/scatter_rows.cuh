// Kernel of scatter_tokens; see gather.cu.
#pragma once

#include "normals.cuh"
#include "rows.cuh"

namespace d2v {

template <class T>
struct ScatterArguments {
  const T* x;            // [N, E + K, D]
  const int32_t* slot;   // [N, T]
  const int64_t* seed;   // []; null: seed_number
  T* out;                // [N, T, D]
  int64_t x_stride_n, x_stride_s, seed_number;
  int32_t rows, tokens, extras, width;
  float noise_std;  // 0: masked places are 0
};

// One warp makes one row of out: a copy where the token was kept, else noise. Lanes of a warp never part, so a kept
// token costs no normals; one counter makes the normals of four neighbouring columns, and a lane makes all that it
// stores.
template <class T, int32_t kVector>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    scatter_fwd_kernel(const __grid_constant__ ScatterArguments<T> args) {
  const int64_t n = row_of(blockIdx.y, blockIdx.z, gridDim.y);
  const int32_t t = static_cast<int32_t>(blockIdx.x * kRowWarps + threadIdx.x / kWarp);
  if (n >= args.rows || t >= args.tokens) return;
  T* out = args.out + (n * args.tokens + t) * args.width;
  const int32_t slot = args.slot[n * args.tokens + t];
  if (slot >= 0 || args.noise_std == 0.0f) {
    const T* x = args.x + n * args.x_stride_n + static_cast<int64_t>(slot + args.extras) * args.x_stride_s;
    copy_row<T, kVector>(out, slot >= 0 ? x : nullptr, args.width);
    return;
  }
  const uint64_t seed = static_cast<uint64_t>(args.seed != nullptr ? *args.seed : args.seed_number);
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  // Columns of a turn: what one access takes, and whole counters.
  constexpr int32_t kColumns = kVector < 4 ? 4 : kVector;
  for (int32_t d = kColumns * (static_cast<int32_t>(threadIdx.x) % kWarp); d < args.width; d += kColumns * kWarp) {
    float noise[kColumns];
#pragma unroll
    for (int32_t j = 0; j < kColumns; j += 4) {
      const Normals4 four = element_normals(static_cast<uint32_t>(d + j) / 4, static_cast<uint32_t>(t),
                                            static_cast<uint32_t>(n), k0, k1);
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) noise[j + i] = four.v[i] * args.noise_std;
    }
    if constexpr (kVector >= 4) {
      Vector<T, kVector> some;
      some.set(noise);
      store<T, kVector>(out, d / kVector, some);
    } else {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        if (d + i < args.width) out[d + i] = rounded<T>(noise[i]);
      }
    }
  }
}

}  // namespace d2v
