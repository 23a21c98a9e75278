// Kernels of scatter_tokens; see gather.cu.
#pragma once

#include "normals.cuh"
#include "rows.cuh"

namespace d2v {

template <class T>
struct ScatterArguments {
  const T* x;            // [N, E + K, D]
  const int32_t* slot;   // [N, T]
  const int64_t* seed;   // []; null: seed_number
  const T* token;        // [D]: stands at masked places where noise_std is 0; null: 0 does
  T* out;                // [N, F + T, D]
  int64_t x_stride_n, x_stride_s, seed_number;
  int32_t rows, tokens, extras, width;
  int32_t front;    // F: E extra tokens that stay, or 0
  float noise_std;  // 0: masked places are 0
};

// One warp makes one row of out: a copy where the token was kept, else noise. Lanes of a warp never part, so a kept
// token costs no normals; one counter makes the normals of four neighbouring columns, and a lane makes all that it
// stores.
template <class T, int32_t kVector>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    scatter_fwd_kernel(const __grid_constant__ ScatterArguments<T> args) {
  const int64_t n = row_of(blockIdx.y, blockIdx.z, gridDim.y);
  const int32_t row = static_cast<int32_t>(blockIdx.x * kRowWarps + threadIdx.x / kWarp), t = row - args.front;
  if (n >= args.rows || t >= args.tokens) return;
  T* out = args.out + (n * (args.front + args.tokens) + row) * args.width;
  const int32_t slot = t >= 0 ? args.slot[n * args.tokens + t] : -1;
  const int32_t source = t < 0 ? row : (slot >= 0 ? slot + args.extras : -1);
  if (source >= 0 || args.noise_std == 0.0f) {
    const T* x = args.x + n * args.x_stride_n + static_cast<int64_t>(source) * args.x_stride_s;
    copy_row<T, kVector>(out, source >= 0 ? x : args.token, args.width);
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

template <class T>
struct MaskTokenArguments {
  const T* dout;        // [N, T, D]
  const int32_t* slot;  // [N, T]
  float* sums;          // [parts, D]
  int64_t dout_stride_n, dout_stride_t, places;  // places: N T
  int32_t tokens, width, each, parts;            // each: places of a part
};

// Rows of a part that a warp has under way at once.
constexpr int32_t kPlaces = 4;

// One warp: the sum over the masked ones of a part's places, in their order, of 32 vectors of columns.
template <class T, int32_t kVector>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    mask_token_bwd_kernel(const __grid_constant__ MaskTokenArguments<T> args) {
  const uint32_t vectors = static_cast<uint32_t>(args.width / kVector), chunks = (vectors + kWarp - 1) / kWarp;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
  const int64_t part = item / chunks;
  const uint32_t c = static_cast<uint32_t>(item % chunks) * kWarp + threadIdx.x % kWarp;
  if (part >= args.parts || c >= vectors) return;
  const int64_t first = part * args.each;
  const int64_t end = first + args.each < args.places ? first + args.each : args.places;
  float total[kVector] = {};
  for (int64_t begin = first; begin < end; begin += kPlaces) {
    bool masked[kPlaces];
    Vector<T, kVector> row[kPlaces];
#pragma unroll
    for (int32_t i = 0; i < kPlaces; ++i) masked[i] = begin + i < end && args.slot[begin + i] < 0;
#pragma unroll
    for (int32_t i = 0; i < kPlaces; ++i) {
      const int64_t n = (begin + i) / args.tokens, t = (begin + i) % args.tokens;
      const T* dout = args.dout + n * args.dout_stride_n + t * args.dout_stride_t;
      row[i] = masked[i] ? load<T, kVector>(dout, static_cast<int32_t>(c)) : zeros<T, kVector>();
    }
#pragma unroll
    for (int32_t i = 0; i < kPlaces; ++i) {
#pragma unroll
      for (int32_t j = 0; j < kVector; ++j) total[j] += row[i].get(j);
    }
  }
  float* out = args.sums + part * args.width + static_cast<int64_t>(c) * kVector;
  constexpr int32_t kWide = kVector < 4 ? kVector : 4;
#pragma unroll
  for (int32_t j = 0; j < kVector; j += kWide) {
    Vector<float, kWide> some;
#pragma unroll
    for (int32_t i = 0; i < kWide; ++i) some.element[i] = total[j + i];
    store<float, kWide>(out, j / kWide, some);
  }
}

}  // namespace d2v
