// Moving average of many tensors in one launch: teacher += (1 - decay) (student - teacher); copy = round(teacher).
//
// Table columns: teacher (fp32), student and copy (fp32, fp16 or bf16; the copy may be absent), per row. One block does
// one chunk of one row, a thread kBatch fours of elements at a time, all of whose loads go out before the first
// arithmetic. fp32 arithmetic; 1 - decay in fp64. Bytes per element, as at the floor: 12 with an fp32 student, 10 with
// a 16-bit one, and those of the copy.
#pragma once

#include "ema.cuh"
#include "table.cuh"

namespace d2v {
constexpr int32_t kBatch = 2;

template <int32_t kStudent>
__device__ __forceinline__ void average_fours(const Chunk& chunk, uint64_t teacher, uint64_t student, uint64_t copy,
                                              int32_t copy_code, float weight) {
  const int64_t first = chunk.first / 4;
  const int32_t fours = chunk.in_fours / 4;
  for (int32_t begin = static_cast<int32_t>(threadIdx.x); begin < fours; begin += kBatch * kTableThreads) {
    float4 t[kBatch];
    typename Four<kStudent>::Raw raw[kBatch];
#pragma unroll
    for (int32_t i = 0; i < kBatch; ++i) {
      const int32_t at = begin + i * kTableThreads;
      if (at < fours) {
        t[i] = load_four<kFp32>(teacher, first + at);
        raw[i] = load_four<kStudent>(student, first + at);
      }
    }
#pragma unroll
    for (int32_t i = 0; i < kBatch; ++i) {
      const int32_t at = begin + i * kTableThreads;
      if (at < fours) {
        const float4 s = widen<kStudent>(raw[i]);
        const float4 mean = make_float4(lerp(t[i].x, s.x, weight), lerp(t[i].y, s.y, weight),
                                        lerp(t[i].z, s.z, weight), lerp(t[i].w, s.w, weight));
        store_four(teacher, kFp32, first + at, mean);
        if (copy_code != kNone) store_four(copy, copy_code, first + at, mean);
      }
    }
  }
}

__global__ void __launch_bounds__(kTableThreads)
    ema_fwd_kernel(const int64_t* table, int32_t chunk_size, const __grid_constant__ Kinds kinds, DeviceScalar decay,
                   float weight) {
  const Chunk chunk = find_chunk(table, blockIdx.x, chunk_size);
  const uint32_t kind = kinds.packed[chunk.kind];
  const uint64_t teacher = address_of(chunk, 0), student = address_of(chunk, 1), copy = address_of(chunk, 2);
  const int32_t student_code = code_of(kind, 1), copy_code = code_of(kind, 2);
  if (decay.at != nullptr) weight = weight_of(decay.read());
  if (student_code == kFp32) {
    average_fours<kFp32>(chunk, teacher, student, copy, copy_code, weight);
  } else if (student_code == kFp16) {
    average_fours<kFp16>(chunk, teacher, student, copy, copy_code, weight);
  } else {
    average_fours<kBf16>(chunk, teacher, student, copy, copy_code, weight);
  }
  for (int32_t i = chunk.in_fours + static_cast<int32_t>(threadIdx.x); i < chunk.count; i += kTableThreads) {
    const int64_t at = chunk.first + i;
    const float mean = lerp(load_one(teacher, kFp32, at), load_one(student, student_code, at), weight);
    store_one(teacher, kFp32, at, mean);
    if (copy_code != kNone) store_one(copy, copy_code, at, mean);
  }
}

}  // namespace d2v
