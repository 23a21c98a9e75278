// Masks of N = B * M rows in one launch: a MaskPlan's mask [N, T] (bytes), ids_keep [N, K] and slot [N, T] (int32).
//
// The algorithm is `sample_row` of masks.cuh, the definition d2vkern/reference/masks.py; row n = b * M + m. One block
// does one row, one warp of it up to 256 tokens. Priorities and marks of up to 8,192 tokens stay in shared memory; of
// longer rows they wait in the row's own slot and mask, which stay in cache. No sort, no atomics, no floating point.
// Bytes: 5 T + 4 K written per row and 8 read per sample, the floor.
#pragma once

#include "launch.cuh"
#include "masks.cuh"

namespace d2v {
constexpr int32_t kMostWarps = kMostMaskThreads / kWarp;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// The threads of a block. Sums of warps go through one of two buffers in turn: whoever writes a buffer again has passed
// the barrier of the sum in between, and so has everyone who read it.
class BlockTeam {
 public:
  __device__ __forceinline__ explicit BlockTeam(uint32_t (*sums)[kMostWarps]) : sums_(sums) {}
  __device__ __forceinline__ int32_t rank() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ __forceinline__ int32_t size() const { return static_cast<int32_t>(blockDim.x); }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ int32_t sum(int32_t value) {
    const uint32_t own = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value));
    return static_cast<int32_t>(blockDim.x == kWarp ? own : sum_warps(own, kMostWarps));
  }
  __device__ __forceinline__ uint32_t sum_before(uint32_t value, uint32_t& total) {
    const uint32_t lane = threadIdx.x % kWarp;
    uint32_t upto = value;
#pragma unroll
    for (uint32_t step = 1; step < kWarp; step *= 2) {
      const uint32_t lower = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += lower;
    }
    total = __shfl_sync(kAllLanes, upto, kWarp - 1);
    if (blockDim.x == kWarp) return upto - value;
    const uint32_t own = total;
    total = sum_warps(own, kMostWarps);
    // The barrier is behind us, and the buffer is still that of this sum.
    return upto - value + read_sums(threadIdx.x / kWarp);
  }

 private:
  // The sum over all warps of what each of them has.
  __device__ __forceinline__ uint32_t sum_warps(uint32_t own, uint32_t warps) {
    turn_ ^= 1;
    if (threadIdx.x % kWarp == 0) sums_[turn_][threadIdx.x / kWarp] = own;
    __syncthreads();
    return read_sums(warps);
  }
  __device__ __forceinline__ uint32_t read_sums(uint32_t warps) const {
    const uint32_t lane = threadIdx.x % kWarp, limit = min(warps, blockDim.x / kWarp);
    return __reduce_add_sync(kAllLanes, lane < limit ? sums_[turn_][lane] : 0u);
  }

  uint32_t (*sums_)[kMostWarps];
  uint32_t turn_ = 0;
};

// The block's dynamic shared memory.
__device__ __forceinline__ uint32_t* shared_words() {
#if defined(__CUDACC__)
  extern __shared__ uint32_t words[];
  return words;
#else
  return dynamic_shared();
#endif
}

__global__ void __launch_bounds__(kMostMaskThreads)
    masks_fwd_kernel(const int64_t* ids,    // [B]
                     const int64_t* seed,   // []; null: seed_number
                     const int64_t* epoch,  // []; null: epoch_number
                     uint8_t* mask,         // [N, T]
                     int32_t* slot,         // [N, T]
                     int32_t* ids_keep,     // [N, K]
                     int64_t ids_stride, int64_t seed_number, uint32_t epoch_number, uint32_t clones,
                     MaskShape shape, bool in_shared) {
  uint32_t* shared = shared_words();
  __shared__ uint32_t sums[2][kMostWarps];
  const int64_t n = blockIdx.x;
  const uint32_t b = blockIdx.x / clones, m = blockIdx.x % clones;
  const int32_t tokens = shape.height * shape.width;
  const int32_t kept = shape.keep_chosen ? shape.target : tokens - shape.target;
  const RowStream stream = row_stream(ids[b * ids_stride], m, seed != nullptr ? *seed : seed_number,
                                      epoch != nullptr ? static_cast<uint32_t>(*epoch) : epoch_number);
  mask += n * tokens;
  slot += n * tokens;
  BlockTeam team(sums);
  if (in_shared) {
    sample_row(team, shape, stream, shared, reinterpret_cast<uint8_t*>(shared + (tokens + 3) / 4 * 4), mask, slot,
               ids_keep + n * kept);
  } else {
    sample_row(team, shape, stream, reinterpret_cast<uint32_t*>(slot), mask, mask, slot, ids_keep + n * kept);
  }
}

}  // namespace d2v
