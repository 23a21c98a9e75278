// What every launcher does around its kernel: the tensor's device, its current stream, a check after the launch.
//
// The extension also loads where torch has no CUDA, so the one CUDA symbol of torch is bound weakly. The CUDA runtime
// is linked statically and has an error state of its own, which is read after every launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "launch.cuh"
#include "vectors.cuh"

#pragma weak aoti_torch_get_current_cuda_stream

// A CUDA call that must succeed; `op` begins the message.
#define D2V_CUDA_CHECK(op, call)                                                                     \
  do {                                                                                               \
    const cudaError_t d2v_error = (call);                                                            \
    STD_TORCH_CHECK(d2v_error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(d2v_error)); \
  } while (false)

// After a launch.
#define D2V_KERNEL_CHECK(op) D2V_CUDA_CHECK(op, cudaGetLastError())

namespace d2v {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device the current one for as long as it lives, and knows that device's current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "d2vkern: CUDA tensors must come from a torch with CUDA, got one without");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                    "d2vkern: torch gave no current stream of device ", x.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Starts a kernel on a grid that launch.cuh made, unless there is nothing to do.
template <class... Parameters, class... Arguments>
void start(const char* op, const Grid& grid, cudaStream_t stream, void (*kernel)(Parameters...),
           Arguments... arguments) {
  if (grid.empty()) return;
  STD_TORCH_CHECK(grid.possible(), op, ": tensors must need at most ", kMostBlocksX, " x ", kMostBlocksYZ, " x ",
                  kMostBlocksYZ, " blocks, got ", grid.x, " x ", grid.y, " x ", grid.z);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  kernel<<<blocks, static_cast<unsigned>(grid.threads), static_cast<size_t>(grid.shared), stream>>>(arguments...);
  D2V_KERNEL_CHECK(op);
}

// A seed from its words, low and high, each 0 .. 2^32 - 1.
inline int64_t seed_of(const std::vector<int64_t>& words) {
  return static_cast<int64_t>(static_cast<uint64_t>(words[0]) | static_cast<uint64_t>(words[1]) << 32);
}

// A 0-dim int64 tensor that a kernel reads on the device of `like`; null: there is none.
inline const int64_t* device_word(const char* op, const char* name, const std::optional<Tensor>& x,
                                  const Tensor& like) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == like.get_device_index() &&
                      x->scalar_type() == ScalarType::Long && x->numel() == 1,
                  op, ": ", name, " must be a 0-dim int64 tensor on the device of the others");
  return static_cast<const int64_t*>(x->const_data_ptr());
}

// The code of a 0-dim floating tensor that a kernel reads.
inline int32_t scalar_code(const char* op, const char* name, const Tensor& x, int32_t device) {
  STD_TORCH_CHECK(x.numel() == 1, op, ": ", name, " must have one element, got ", x.numel());
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == device, op, ": ", name, " must be on CUDA device ", device,
                  ", got another device");
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return kFp64;
    case ScalarType::Float:
      return kFp32;
    case ScalarType::Half:
      return kFp16;
    case ScalarType::BFloat16:
      return kBf16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be fp64, fp32, fp16 or bf16, got dtype number ",
                      static_cast<int>(x.scalar_type()));
  }
  return kNone;
}

}  // namespace d2v
