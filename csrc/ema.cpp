// Moving average of many tensors on a CPU, in one pass over memory.
//
//     teacher += (1 - decay) (student - teacher);  copy = round(teacher)
//
// Rows and threads: tensors.hpp; teacher fp32, student and copy fp32, fp16 or bf16, per row. A span is worked on in
// blocks that stay in the first cache, so that 16-bit students and copies cost no pass over memory; copies larger
// than the caches are written past them. All arithmetic is fp32; 1 - decay is made in fp64. Bytes per element as at
// the floor: 12 with an fp32 student, 10 with a 16-bit one, 2 more for a 16-bit copy.
#include "ema.cuh"
#include "tensors.hpp"

namespace d2v {
namespace {

constexpr int64_t kBlock = 1024;

struct Average {
  static D2V_INLINE void run(float* teacher, const char* student, Dtype student_dtype, char* copy, Dtype copy_dtype,
                             float weight, int64_t count, bool past_caches) {
    float buffer[kBlock];
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t block = std::min(kBlock, count - first);
      const char* source = student + first * item_size(student_dtype);
      const float* __restrict s = values(student_dtype, source, buffer, block);
      float* __restrict t = teacher + first;
      for (int64_t part = 0; part < block; part += kPart) {
        for (int64_t line = part; line < part + kPart; line += kLine) {
          prefetch_ahead(t + line);
          prefetch_ahead(source + line * item_size(student_dtype));
        }
        const int64_t end = std::min(block, part + kPart);
        for (int64_t i = part; i < end; ++i) t[i] = lerp(t[i], s[i], weight);
      }
      if (copy != nullptr) store(copy_dtype, t, copy + first * item_size(copy_dtype), block, past_caches);
    }
  }
};

void ema_update_(std::vector<Tensor> teacher, std::vector<Tensor> student, std::vector<Tensor> copies,
                 std::vector<int64_t> copied, double decay, Optional decay_tensor) {
  const float weight = weight_of(read_number("ema", "decay", decay_tensor, decay));
  Rows<3> rows("ema", {{{"teacher", teacher, nullptr, true, true},
                        {"student", student, nullptr, false, false},
                        {"copies", copies, &copied, true, false}}});
  const bool past_caches = rows.past_caches();
  rows.run([&](const Rows<3>::Row& row, int64_t offset, int64_t count) {
    const auto at = [&](int c) { return row.address[c] ? row.address[c] + offset * item_size(row.dtype[c]) : nullptr; };
    dispatch_wide<Average>(reinterpret_cast<float*>(at(0)), at(1), row.dtype[1], at(2), row.dtype[2], weight, count,
                           past_caches);
    fence(past_caches);
  });
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CPU, m) { m.impl("ema_update_", TORCH_BOX(&d2v::ema_update_)); }
