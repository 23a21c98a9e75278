// Kernels of gather_tokens and its gradients; see gather.cu.
#pragma once

#include "rows.cuh"

namespace d2v {

template <class T>
struct GatherArguments {
  const T* x;           // [B, T, D]
  const int32_t* ids;   // [N, K], -1: nothing stands there
  const T* extra;       // [E, D], or [N, E, D]; null: extra tokens are 0
  const T* positions;   // [T, D] or null
  const T* per_mask;    // [N, T, D] or null
  T* out;               // [N, E + K, D]
  int64_t x_stride_b, x_stride_t, extra_stride_n, extra_stride_e;  // extra_stride_n 0: the same for all rows
  int64_t positions_stride, per_mask_stride_n, per_mask_stride_t;
  int32_t rows, kept, extras, width, clones;
};

// One warp makes one row of out: out[n, E + k] = (x[b, t] + positions[t]) + per_mask[n, t] with t = ids[n, k].
template <class T, int32_t kVector>
__global__ void __launch_bounds__(kRowWarps* kWarp) gather_fwd_kernel(const __grid_constant__ GatherArguments<T> args) {
  const int64_t n = row_of(blockIdx.y, blockIdx.z, gridDim.y);
  const int32_t s = static_cast<int32_t>(blockIdx.x * kRowWarps + threadIdx.x / kWarp);
  if (n >= args.rows || s >= args.extras + args.kept) return;
  T* out = args.out + (n * (args.extras + args.kept) + s) * args.width;
  const bool in_front = s < args.extras;
  const int64_t t = in_front ? -1 : args.ids[n * args.kept + s - args.extras];
  if (t < 0) {
    const T* extra = args.extra + n * args.extra_stride_n + s * args.extra_stride_e;
    copy_row<T, kVector>(out, in_front && args.extra != nullptr ? extra : nullptr, args.width);
    return;
  }
  const T* x = args.x + static_cast<uint32_t>(n) / static_cast<uint32_t>(args.clones) * args.x_stride_b +
               t * args.x_stride_t;
  const T* positions = args.positions + t * args.positions_stride;
  const T* per_mask = args.per_mask + n * args.per_mask_stride_n + t * args.per_mask_stride_t;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp, vectors = args.width / kVector;
  for (int32_t begin = lane; begin < vectors; begin += kUnroll * kWarp) {
    Vector<T, kVector> sum[kUnroll], more[kUnroll];
#pragma unroll
    for (int32_t i = 0; i < kUnroll; ++i) {
      const int32_t c = begin + i * kWarp;
      if (c < vectors) sum[i] = load<T, kVector>(x, c);
    }
    if (args.positions != nullptr) {
#pragma unroll
      for (int32_t i = 0; i < kUnroll; ++i) {
        const int32_t c = begin + i * kWarp;
        if (c < vectors) more[i] = load<T, kVector>(positions, c);
      }
#pragma unroll
      for (int32_t i = 0; i < kUnroll; ++i) sum[i] = add(sum[i], more[i]);
    }
    if (args.per_mask != nullptr) {
#pragma unroll
      for (int32_t i = 0; i < kUnroll; ++i) {
        const int32_t c = begin + i * kWarp;
        if (c < vectors) more[i] = load<T, kVector>(per_mask, c);
      }
#pragma unroll
      for (int32_t i = 0; i < kUnroll; ++i) sum[i] = add(sum[i], more[i]);
    }
#pragma unroll
    for (int32_t i = 0; i < kUnroll; ++i) {
      const int32_t c = begin + i * kWarp;
      if (c < vectors) store<T, kVector>(out, c, sum[i]);
    }
  }
}

template <class T>
struct GatherGradients {
  const T* dout;         // [N, E + K, D]
  const int32_t* slot;   // [N, T]
  T* dx;                 // [B, T, D] or null
  T* dper_mask;          // [N, T, D] or null
  float* sums;           // [G, summed, D], of rows first, first + 1, ...; or null
  int64_t dout_stride_n, dout_stride_s;
  int32_t groups, group, samples, clones, tokens, extras, width;
  int32_t first, visited, summed;  // of the rows [extra tokens, tokens]
};

// Versions of a sample whose rows are under way at once.
constexpr int32_t kVersions = 4;

// One warp: a row (an extra token or a token) and 32 vectors of its columns, of one group of samples, looked up in all
// M versions of each. Nothing is cleared first, no atomics: sums run over m in order, then over the group's samples.
template <class T, int32_t kVector>
__global__ void __launch_bounds__(kRowWarps* kWarp, 2)
    gather_bwd_kernel_rows(const __grid_constant__ GatherGradients<T> args) {
  const int64_t group = row_of(blockIdx.y, blockIdx.z, gridDim.y);
  const uint32_t vectors = static_cast<uint32_t>(args.width / kVector), parts = (vectors + kWarp - 1) / kWarp;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
  const int64_t place = item / parts;
  const uint32_t c = static_cast<uint32_t>(item % parts) * kWarp + threadIdx.x % kWarp;
  if (group >= args.groups || place >= args.visited || c >= vectors) return;
  const int64_t row = args.first + place, t = row - args.extras;
  float total[kVector] = {};
  for (int32_t member = 0; member < args.group; ++member) {
    const int64_t b = group * args.group + member;
    if (b >= args.samples) break;
    float dx[kVector] = {};
    for (int32_t m = 0; m < args.clones; m += kVersions) {
      int64_t source[kVersions];
      Vector<T, kVector> part[kVersions];
#pragma unroll
      for (int32_t i = 0; i < kVersions; ++i) {
        source[i] = -1;
        if (m + i < args.clones) {
          const int32_t slot = t >= 0 ? args.slot[(b * args.clones + m + i) * args.tokens + t] : 0;
          source[i] = t < 0 ? row : (slot >= 0 ? slot + args.extras : -1);
        }
      }
#pragma unroll
      for (int32_t i = 0; i < kVersions; ++i) {
        const T* dout = args.dout + (b * args.clones + m + i) * args.dout_stride_n + source[i] * args.dout_stride_s;
        part[i] = source[i] >= 0 ? load<T, kVector>(dout, static_cast<int32_t>(c)) : zeros<T, kVector>();
      }
#pragma unroll
      for (int32_t i = 0; i < kVersions; ++i) {
        if (args.dper_mask != nullptr && t >= 0 && m + i < args.clones) {
          T* out = args.dper_mask + ((b * args.clones + m + i) * args.tokens + t) * args.width;
          store<T, kVector>(out, static_cast<int32_t>(c), part[i]);
        }
#pragma unroll
        for (int32_t j = 0; j < kVector; ++j) dx[j] += part[i].get(j);
      }
    }
    if (args.dx != nullptr && t >= 0) {
      Vector<T, kVector> out;
      out.set(dx);
      store<T, kVector>(args.dx + (b * args.tokens + t) * args.width, static_cast<int32_t>(c), out);
    }
#pragma unroll
    for (int32_t j = 0; j < kVector; ++j) total[j] += dx[j];
  }
  if (args.sums != nullptr && place < args.summed) {
    float* out = args.sums + (group * args.summed + place) * args.width + static_cast<int64_t>(c) * kVector;
    constexpr int32_t kWide = kVector < 4 ? kVector : 4;
#pragma unroll
    for (int32_t j = 0; j < kVector; j += kWide) {
      Vector<float, kWide> some;
#pragma unroll
      for (int32_t i = 0; i < kWide; ++i) some.element[i] = total[j + i];
      store<float, kWide>(out, j / kWide, some);
    }
  }
}

// Sums of a table's columns [G, C] in the order of its rows: columns before `split` into low, the others into high.
// A thread makes kVector neighbouring ones, all of the same side.
template <class T, int32_t kVector>
__global__ void __launch_bounds__(kSumThreads)
    gather_bwd_kernel_sums(const float* __restrict__ sums, T* low, T* high, int64_t groups, int64_t columns,
                           int64_t split) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  for (int64_t column = 4 * thread; column < 4 * thread + 4 && column < columns; column += kVector) {
    float total[kVector] = {};
#pragma unroll 8
    for (int64_t g = 0; g < groups; ++g) {
      const auto part = load<float, kVector>(sums + g * columns + column, 0);
#pragma unroll
      for (int32_t j = 0; j < kVector; ++j) total[j] += part.element[j];
    }
    Vector<T, kVector> out;
    out.set(total);
    store<T, kVector>(column < split ? low + column : high + (column - split), 0, out);
  }
}

}  // namespace d2v
