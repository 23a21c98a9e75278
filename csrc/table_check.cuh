// What launchers of kernels over pointer tables check and pack.
#pragma once

#include "cuda_check.cuh"
#include "table.cuh"

namespace d2v {

// The kinds of a launch from the op's flat list, one code per column. `fp32` names the columns that must be fp32 where
// there is a tensor.
inline Kinds kinds_of(const char* op, const std::vector<int64_t>& codes, int32_t columns,
                      const std::vector<int32_t>& fp32) {
  const int64_t count = static_cast<int64_t>(codes.size()) / columns;
  STD_TORCH_CHECK(count * columns == static_cast<int64_t>(codes.size()), op, ": kinds must hold ", columns,
                  " codes each, got ", codes.size(), " in all");
  STD_TORCH_CHECK(count <= kMostKinds, op, ": tensors must have at most ", kMostKinds,
                  " different combinations of dtypes, got ", count);
  Kinds kinds = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t column = 0; column < columns; ++column) {
      const int64_t code = codes[static_cast<size_t>(i * columns + column)];
      STD_TORCH_CHECK(code >= kNone && code <= kBf16, op, ": kinds must be codes 0 to 3, got ", code);
      kinds.packed[i] = static_cast<uint16_t>(kinds.packed[i] | code << 2 * column);
    }
    for (const int32_t column : fp32) {
      const int32_t code = code_of(kinds.packed[i], column);
      STD_TORCH_CHECK(code == kFp32 || code == kNone, op, ": column ", column,
                      " of the table must be fp32 on CUDA, got code ", code);
    }
  }
  return kinds;
}

inline void check_table(const char* op, const Tensor& table, int64_t programs, int64_t chunk) {
  STD_TORCH_CHECK(table.is_cuda() && table.scalar_type() == ScalarType::Long && table.is_contiguous(), op,
                  ": table must be a contiguous int64 tensor on a CUDA device");
  STD_TORCH_CHECK(programs >= 0 && programs <= table.numel(), op, ": programs must be within the table's ",
                  table.numel(), " words, got ", programs);
  STD_TORCH_CHECK(chunk >= 4 && chunk % 4 == 0 && chunk <= 1 << 24, op,
                  ": chunk must be a multiple of 4 up to 2^24, got ", chunk);
}

inline DeviceScalar device_scalar(const char* op, const char* name, const std::optional<Tensor>& x,
                                  int32_t device) {
  if (!x.has_value()) return {};
  return {x->const_data_ptr(), scalar_code(op, name, *x, device)};
}

}  // namespace d2v
