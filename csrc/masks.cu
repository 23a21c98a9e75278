// Masks of N = B * M rows in one launch: a MaskPlan's mask [N, T] (bytes), ids_keep [N, K] and slot [N, T] (int32).
//
// The algorithm is `sample_row` of masks.cuh, the definition d2vkern/reference/masks.py; row n = b * M + m. One block
// does one row, one warp of it up to 256 tokens. Priorities and marks of up to 8,192 tokens stay in shared memory; of
// longer rows they wait in the row's own slot and mask, which stay in cache. No sort, no atomics, no floating point.
// Bytes: 5 T + 4 K written per row and 8 read per sample, the floor.
#include "cuda_check.cuh"
#include "masks.cuh"

namespace d2v {
namespace {

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

__global__ void __launch_bounds__(kMostMaskThreads)
    masks_fwd_kernel(const int64_t* ids,    // [B]
                     const int64_t* seed,   // []; null: seed_number
                     const int64_t* epoch,  // []; null: epoch_number
                     uint8_t* mask,         // [N, T]
                     int32_t* slot,         // [N, T]
                     int32_t* ids_keep,     // [N, K]
                     int64_t ids_stride, int64_t seed_number, uint32_t epoch_number, uint32_t clones,
                     MaskShape shape, bool in_shared) {
  extern __shared__ uint32_t shared[];
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

std::tuple<Tensor, Tensor, Tensor> masks_fwd(const Tensor& ids, const std::optional<Tensor>& seed,
                                             const std::optional<Tensor>& epoch, const std::vector<int64_t>& words,
                                             int64_t clones, const std::vector<int64_t>& grid,
                                             const std::vector<int64_t>& block, int64_t centres, int64_t target,
                                             bool keep_chosen) {
  STD_TORCH_CHECK(ids.is_cuda() && ids.dim() == 1 && ids.scalar_type() == ScalarType::Long,
                  "masks: ids must be a 1-dim int64 tensor on a CUDA device");
  STD_TORCH_CHECK(words.size() == 3 && grid.size() == 2 && block.size() == 2,
                  "masks: words must have 3 numbers, grid and block 2, got ", words.size(), ", ", grid.size(), ", ",
                  block.size());
  // Of the counters: 12 bits for the clone, 20 for the draw.
  STD_TORCH_CHECK(clones >= 1 && clones <= 1 << 12, "masks: clones must be in 1 .. 4096, got ", clones);
  STD_TORCH_CHECK(grid[0] >= 1 && grid[1] >= 1 && grid[0] <= (1 << 20) / grid[1],
                  "masks: grid must have 1 .. 2^20 cells, got ", grid[0], " x ", grid[1]);
  const int64_t rows = ids.size(0) * clones, tokens = grid[0] * grid[1];
  STD_TORCH_CHECK(target >= 0 && target <= tokens && centres >= 0 && centres <= 1 << 20,
                  "masks: target must be at most the ", tokens, " tokens and centres at most 2^20, got ", target,
                  " and ", centres);
  STD_TORCH_CHECK(block[0] >= 1 && block[1] >= 1 && block[0] <= 1 << 20 && block[1] <= 1 << 20,
                  "masks: block sides must be in 1 .. 2^20, got ", block[0], " x ", block[1]);
  const MaskShape shape = {static_cast<int32_t>(grid[0]),  static_cast<int32_t>(grid[1]),
                           static_cast<int32_t>(centres),  static_cast<int32_t>(block[0]),
                           static_cast<int32_t>(block[1]), static_cast<int32_t>(target),
                           keep_chosen};
  const int64_t* seed_word = device_word("masks", "seed", seed, ids);
  const int64_t* epoch_word = device_word("masks", "epoch", epoch, ids);
  const OnDeviceOf device(ids);
  Tensor mask = new_empty(ids, {rows, tokens}, ScalarType::Bool);
  Tensor ids_keep = new_empty(ids, {rows, keep_chosen ? target : tokens - target}, ScalarType::Int);
  Tensor slot = new_empty(ids, {rows, tokens}, ScalarType::Int);
  const Grid launch = masks_grid(rows, static_cast<int32_t>(tokens));
  start("masks", launch, device.stream(), masks_fwd_kernel, static_cast<const int64_t*>(ids.const_data_ptr()),
        seed_word, epoch_word, static_cast<uint8_t*>(mask.mutable_data_ptr()),
        static_cast<int32_t*>(slot.mutable_data_ptr()), static_cast<int32_t*>(ids_keep.mutable_data_ptr()),
        ids.stride(0), seed_of(words), static_cast<uint32_t>(words[2]), static_cast<uint32_t>(clones),
        shape, launch.shared > 0);
  return {mask, ids_keep, slot};
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CUDA, m) { m.impl("masks_fwd", TORCH_BOX(&d2v::masks_fwd)); }
