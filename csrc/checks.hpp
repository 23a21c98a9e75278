// What every op of the extension needs of PyTorch's stable ABI: tensors, dtype codes, checks and their words.
//
// The torch headers are those of the stable ABI at target 2.10 (TORCH_TARGET_VERSION), so that one library loads
// beside every torch from 2.10 on. Errors are std::invalid_argument, which Python sees as ValueError: the public
// functions have checked their arguments before; these checks keep direct calls of torch.ops from reading wild
// memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#define D2V_CHECK(condition, ...)                                    \
  do {                                                               \
    if (!(condition)) throw std::invalid_argument(d2v::words(__VA_ARGS__)); \
  } while (0)

namespace d2v {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Codes of kernels/_table.py.
enum Dtype : int32_t { kNone = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

template <class... Parts>
std::string words(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// kNone for a dtype that no kernel reads.
inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      return kNone;
  }
}

inline Dtype checked_dtype(const char* op, const char* name, const Tensor& x) {
  const Dtype dtype = dtype_of(x);
  D2V_CHECK(dtype != kNone, op, ": ", name, " must be fp32, fp16 or bf16, got ",
            torch::headeronly::toString(x.scalar_type()));
  return dtype;
}

inline int64_t item_size(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

inline std::string shape_of(const Tensor& x) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "") << x.size(i);
  text << ")";
  return text.str();
}

inline void check_shape(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) {
    if (!fits) break;
    fits = size < 0 || x.size(i) == size;
    ++i;
  }
  if (fits) return;
  std::ostringstream text;
  text << op << ": " << name << " must have shape (";
  i = 0;
  for (int64_t size : sizes) {
    text << (i++ ? ", " : "");
    if (size < 0) {
      text << "any";
    } else {
      text << size;
    }
  }
  text << "), got " << shape_of(x);
  throw std::invalid_argument(text.str());
}

inline void check_type(const char* op, const char* name, const Tensor& x, ScalarType type) {
  D2V_CHECK(x.scalar_type() == type, op, ": ", name, " must have dtype ", torch::headeronly::toString(type), ", got ",
            torch::headeronly::toString(x.scalar_type()));
}

inline void check_device(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  D2V_CHECK(x.is_cuda() == like.is_cuda() && x.is_cpu() == like.is_cpu() &&
                x.get_device_index() == like.get_device_index(),
            op, ": ", name, " must be on the device of the others");
}

// [B, T, D] and the like with any strides but a contiguous last dimension; copied where it is not.
inline Tensor dense_last(const Tensor& x) {
  return x.dim() == 0 || x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                        std::optional<ScalarType> type = std::nullopt) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, shape, type);
}

}  // namespace d2v
