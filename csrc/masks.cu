// Launcher of masks; kernel: masks_kernel.cuh.
#include "cuda_check.cuh"
#include "masks_kernel.cuh"

namespace d2v {
namespace {

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
