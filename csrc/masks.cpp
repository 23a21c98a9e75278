// Masks of N = B * M rows on a CPU: threads share the rows; what one row is stands in masks.cuh.
//
// mask [N, T] as bytes, slot [N, T] and ids_keep [N, K] int32, all contiguous; row n = b * M + m. A row's
// priorities and marks wait in scratch memory of its thread.
#include "masks.cuh"
#include "cpu.hpp"

namespace d2v {
namespace {

struct SampleRow {
  static D2V_INLINE void run(const MaskShape& shape, const RowStream& stream, uint32_t* priority, uint8_t* marked,
                             uint8_t* mask, int32_t* slot, int32_t* ids_keep) {
    SoloTeam team;
    sample_row(team, shape, stream, priority, marked, mask, slot, ids_keep);
  }
};

int64_t read_word(const char* name, const Tensor& x) {
  check_type("masks", name, x, ScalarType::Long);
  D2V_CHECK(x.is_cpu() && x.numel() == 1, "masks: ", name, " must be one number of the CPU");
  return *static_cast<const int64_t*>(x.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> masks_fwd(Tensor ids, Optional seed, Optional epoch, std::vector<int64_t> key,
                                             int64_t clones, std::vector<int64_t> grid, std::vector<int64_t> block,
                                             int64_t centres, int64_t target, bool keep_chosen) {
  const char* op = "masks";
  check_type(op, "ids", ids, ScalarType::Long);
  check_shape(op, "ids", ids, {-1});
  D2V_CHECK(key.size() == 3 && grid.size() == 2 && block.size() == 2, op,
            ": words must have 3 numbers, grid and block 2");
  D2V_CHECK(clones >= 1 && clones <= 1 << 12, op, ": clones must be >= 1 and <= 4096, got ", clones);
  D2V_CHECK(grid[0] >= 1 && grid[1] >= 1 && grid[0] <= 1 << 19 && grid[1] <= 1 << 19 &&
                grid[0] * grid[1] <= 1 << 19,
            op, ": grid must have at least 1 and at most 524288 cells, got ", grid[0], " x ", grid[1]);
  const int64_t tokens = grid[0] * grid[1], rows = ids.size(0) * clones;
  D2V_CHECK(block[0] >= 1 && block[1] >= 1, op, ": block must be >= 1, got ", block[0], " x ", block[1]);
  D2V_CHECK(target >= 0 && target <= tokens, op, ": target must be >= 0 and <= ", tokens, ", got ", target);
  D2V_CHECK(centres >= 0 && centres <= 1 << 20, op, ": centres must be >= 0 and <= 1048576, got ", centres);
  const int64_t kept = keep_chosen ? target : tokens - target;

  const int64_t seed_word =
      seed.has_value() ? read_word("seed", *seed)
                       : static_cast<int64_t>(static_cast<uint64_t>(key[1]) << 32 | (static_cast<uint64_t>(key[0]) & 0xFFFFFFFFu));
  const uint32_t epoch_word = static_cast<uint32_t>(epoch.has_value() ? read_word("epoch", *epoch) : key[2]);
  // A block larger than the grid covers what one of twice its size does.
  const auto side = [](int64_t length, int64_t whole) { return static_cast<int32_t>(std::min(length, 4 * whole)); };
  const MaskShape shape{static_cast<int32_t>(grid[0]), static_cast<int32_t>(grid[1]), static_cast<int32_t>(centres),
                        side(block[0], grid[0]),       side(block[1], grid[1]),       static_cast<int32_t>(target),
                        keep_chosen};
  Tensor mask = new_empty(ids, {rows, tokens}, ScalarType::Bool);
  Tensor ids_keep = new_empty(ids, {rows, kept}, ScalarType::Int), slot = new_empty(ids, {rows, tokens}, ScalarType::Int);
  const auto* id = static_cast<const int64_t*>(ids.data_ptr());
  auto* mask_row = static_cast<uint8_t*>(mask.data_ptr());
  auto *slot_row = static_cast<int32_t*>(slot.data_ptr()), *ids_row = static_cast<int32_t*>(ids_keep.data_ptr());
  const int64_t stride = ids.stride(0);
  in_threads(rows, 1 + 4096 / tokens, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> priority(tokens);
    std::vector<uint8_t> marked(tokens);
    for (int64_t n = begin; n < end; ++n) {
      const RowStream stream =
          row_stream(id[n / clones * stride], static_cast<uint32_t>(n % clones), seed_word, epoch_word);
      dispatch<SampleRow>(shape, stream, priority.data(), marked.data(), mask_row + n * tokens, slot_row + n * tokens,
                          ids_row + n * kept);
    }
  });
  return {mask, ids_keep, slot};
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CPU, m) { m.impl("masks_fwd", TORCH_BOX(&d2v::masks_fwd)); }
