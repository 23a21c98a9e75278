// L2 norm of many tensors on a CPU, in one pass over memory by all threads.
//
//     norm = sqrt(sum of all x^2)
//
// Blocks of 1024 are summed in fp32, in 32 lanes, and again in fp64 where squares might leave fp32's range, so that
// no gradient that fp32 holds overflows; sums of blocks are fp64. Tensors are cut into chunks whose sums are added
// in their order: the bits do not depend on the number of threads. fp32, fp16 or bf16, each tensor its own; dense
// tensors are walked in memory order, others are copied first.
#include "tensors.hpp"

#include <cmath>

namespace d2v {
namespace {

constexpr int64_t kBlock = 1024, kChunk = 65536;
// Of a block's sum in fp32: between them no square overflowed, and none that fp32 rounds to 0 would show.
constexpr double kSmall = 1e-24, kLarge = 1e36;

struct SquareSum {
  static constexpr int64_t kLanes = 32;

  template <class Number>
  static D2V_INLINE double block(const float* __restrict x, const char* source, int64_t bytes, int64_t count) {
    Number lanes[kLanes] = {};
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int64_t line = 0; line < kLanes; line += kLine) prefetch_ahead(source + (i + line) * bytes);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const Number value = x[i + lane];
        lanes[lane] += value * value;
      }
    }
    for (int64_t i = whole; i < count; ++i) {
      const Number value = x[i];
      lanes[i - whole] += value * value;
    }
    double total = 0.0;
    for (const Number lane : lanes) total += static_cast<double>(lane);
    return total;
  }

  static D2V_INLINE void run(double* into, const char* from, Dtype dtype, int64_t count) {
    float buffer[kBlock];
    double total = 0.0;
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t part = std::min(kBlock, count - first), bytes = item_size(dtype);
      const char* source = from + first * bytes;
      const float* x = values(dtype, source, buffer, part);
      double sum = block<float>(x, source, bytes, part);
      if (!(sum > kSmall && sum < kLarge)) sum = block<double>(x, source, bytes, part);
      total += sum;
    }
    *into = total;
  }
};

Tensor l2_norm(std::vector<Tensor> tensors) {
  const char* op = "grad_norm";
  struct Chunk {
    const char* data;
    Dtype dtype;
    int64_t count;
  };
  std::vector<Chunk> chunks;
  std::vector<Tensor> copies;
  int64_t elements = 0;
  for (const Tensor& x : tensors) {
    D2V_CHECK(x.is_cpu(), op, ": grads must all be on the CPU, got one on a device");
    const Dtype dtype = checked_dtype(op, "grads", x);
    if (!is_dense(x)) copies.push_back(torch::stable::contiguous(x));
    const auto* data = static_cast<const char*>((is_dense(x) ? x : copies.back()).data_ptr());
    for (int64_t first = 0; first < x.numel(); first += kChunk) {
      chunks.push_back({data + first * item_size(dtype), dtype, std::min(kChunk, x.numel() - first)});
    }
    elements += x.numel();
  }
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<double> sums(count);
  in_threads(count, 1 + count * kGrain / std::max<int64_t>(1, elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      dispatch_wide<SquareSum>(&sums[i], chunks[i].data, chunks[i].dtype, chunks[i].count);
    }
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  Tensor norm = new_empty(tensors[0], {}, ScalarType::Float);
  *static_cast<float*>(norm.data_ptr()) = static_cast<float>(std::sqrt(total));
  return norm;
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CPU, m) { m.impl("l2_norm", TORCH_BOX(&d2v::l2_norm)); }
