// AdamW, the teacher's moving average and low-precision copies of both: many tensors, one launch, one pass.
//
// Formulas: adamw.cuh. Table columns: p, g, m, v, teacher, copy of p, copy of the teacher; p, m, v and the teacher are
// fp32, the others fp32, fp16 or bf16, and each of the last three may be absent, per row. One block does one chunk of
// one row, a thread four elements at a time. Gradients are only read: the clip factor costs no pass. Scalars are made
// in fp64, on the host from numbers; from 0-dim tensors (clip factor, decay, learning rate, step) one thread of each
// block makes them. With found_inf set a block writes nothing. Bytes per element, as at the floor: 28 for AdamW, 36
// with the teacher, 40 with 16-bit copies of both.
#pragma once

#include "adamw.cuh"
#include "table.cuh"

namespace d2v {
// Numbers and tensors of a call; a tensor stands for the number of the same name.
struct Settings {
  AdamWScalars scalars;  // of the numbers
  DeviceScalar found_inf, clip, decay, step, lr;
  double numbers[8];  // clip, decay, step, lr, beta1, beta2, eps, weight_decay
  bool fairseq;
};

struct Row {
  uint64_t p, g, m, v, teacher, p_copy, t_copy;
  int32_t g_code, teacher_code, p_copy_code, t_copy_code;
};

template <int32_t kGrad>
__device__ __forceinline__ void update_fours(const Chunk& chunk, const Row& row, const AdamWScalars& s) {
  const int64_t first = chunk.first / 4;
  const int32_t fours = chunk.in_fours / 4;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < fours; i += kTableThreads) {
    const int64_t at = first + i;
    float4 p = load_four<kFp32>(row.p, at), m = load_four<kFp32>(row.m, at), v = load_four<kFp32>(row.v, at);
    const auto raw = load_four<kGrad>(row.g, at);
    float4 t = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row.teacher_code != kNone) t = load_four<kFp32>(row.teacher, at);
    const float4 g = widen<kGrad>(raw);
    adamw_element(p.x, g.x, m.x, v.x, s);
    adamw_element(p.y, g.y, m.y, v.y, s);
    adamw_element(p.z, g.z, m.z, v.z, s);
    adamw_element(p.w, g.w, m.w, v.w, s);
    store_four(row.p, kFp32, at, p);
    store_four(row.m, kFp32, at, m);
    store_four(row.v, kFp32, at, v);
    if (row.p_copy_code != kNone) store_four(row.p_copy, row.p_copy_code, at, p);
    if (row.teacher_code != kNone) {
      t = make_float4(lerp(t.x, p.x, s.weight), lerp(t.y, p.y, s.weight), lerp(t.z, p.z, s.weight),
                      lerp(t.w, p.w, s.weight));
      store_four(row.teacher, kFp32, at, t);
      if (row.t_copy_code != kNone) store_four(row.t_copy, row.t_copy_code, at, t);
    }
  }
}

__device__ __forceinline__ void update_ones(const Chunk& chunk, const Row& row, const AdamWScalars& s) {
  for (int32_t i = chunk.in_fours + static_cast<int32_t>(threadIdx.x); i < chunk.count; i += kTableThreads) {
    const int64_t at = chunk.first + i;
    float p = load_one(row.p, kFp32, at), m = load_one(row.m, kFp32, at), v = load_one(row.v, kFp32, at);
    adamw_element(p, load_one(row.g, row.g_code, at), m, v, s);
    store_one(row.p, kFp32, at, p);
    store_one(row.m, kFp32, at, m);
    store_one(row.v, kFp32, at, v);
    if (row.p_copy_code != kNone) store_one(row.p_copy, row.p_copy_code, at, p);
    if (row.teacher_code != kNone) {
      const float t = lerp(load_one(row.teacher, kFp32, at), p, s.weight);
      store_one(row.teacher, kFp32, at, t);
      if (row.t_copy_code != kNone) store_one(row.t_copy, row.t_copy_code, at, t);
    }
  }
}

__global__ void __launch_bounds__(kTableThreads)
    adamw_ema_fwd_kernel(const int64_t* table, int32_t chunk_size, const __grid_constant__ Kinds kinds,
                         const __grid_constant__ Settings settings) {
  if (settings.found_inf.at != nullptr && settings.found_inf.read() != 0.0) return;
  __shared__ AdamWScalars shared;
  if (threadIdx.x == 0) {
    const double *x = settings.numbers, clip = settings.clip.or_number(x[0]), decay = settings.decay.or_number(x[1]);
    if (settings.step.at != nullptr || settings.lr.at != nullptr) {
      shared = adamw_scalars(clip, decay, settings.step.or_number(x[2]), settings.lr.or_number(x[3]), x[4], x[5], x[6],
                             x[7], settings.fairseq);
    } else {
      shared = settings.scalars;
      shared.clip = static_cast<float>(clip);
      shared.weight = weight_of(decay);
    }
  }
  const Chunk chunk = find_chunk(table, blockIdx.x, chunk_size);
  const uint32_t kind = kinds.packed[chunk.kind];
  const Row row = {address_of(chunk, 0), address_of(chunk, 1), address_of(chunk, 2), address_of(chunk, 3),
                   address_of(chunk, 4), address_of(chunk, 5), address_of(chunk, 6), code_of(kind, 1),
                   code_of(kind, 4),     code_of(kind, 5),     code_of(kind, 6)};
  __syncthreads();
  const AdamWScalars s = shared;
  if (row.g_code == kFp32) {
    update_fours<kFp32>(chunk, row, s);
  } else if (row.g_code == kFp16) {
    update_fours<kFp16>(chunk, row, s);
  } else {
    update_fours<kBf16>(chunk, row, s);
  }
  update_ones(chunk, row, s);
}

}  // namespace d2v
