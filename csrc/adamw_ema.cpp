// AdamW, the teacher's moving average and low-precision copies of both on a CPU, in one pass over memory.
//
// Formulas and scalars: adamw.cuh. Rows and threads: tensors.hpp; parameters, moments and teachers fp32, gradients
// and copies fp32, fp16 or bf16, and each of the last three is there in some rows and not in others. A span is
// worked on in blocks that stay in the first cache: 40 bytes per element with teacher and 16-bit copies, the
// floor; copies larger than the caches are written past them, since only the next step reads them. Gradients are
// only read: the clip factor costs no pass. With found_inf set nothing is written.
#include "adamw.cuh"
#include "tensors.hpp"

#include <cmath>

namespace d2v {
namespace {

constexpr int64_t kBlock = 128;
enum { kParam, kGrad, kMoment, kSquare, kTeacher, kCopy, kTeacherCopy, kColumns };
using Row = Rows<kColumns>::Row;

struct Step {
  static D2V_INLINE void run(const Row& row, int64_t offset, int64_t count, const AdamWScalars& scalars,
                             bool past_caches) {
    float buffer[kBlock];
    const AdamWScalars s = scalars;
    for (int64_t first = offset; first < offset + count; first += kBlock) {
      const int64_t block = std::min(kBlock, offset + count - first);
      const auto at = [&](int c) { return row.address[c] + first * item_size(row.dtype[c]); };
      const char *grad = at(kGrad), *teacher = row.address[kTeacher] != nullptr ? at(kTeacher) : nullptr;
      const float* __restrict g = values(row.dtype[kGrad], grad, buffer, block);
      float* __restrict p = reinterpret_cast<float*>(at(kParam));
      float* __restrict m = reinterpret_cast<float*>(at(kMoment));
      float* __restrict v = reinterpret_cast<float*>(at(kSquare));
      for (int64_t part = 0; part < block; part += kPart) {
        for (int64_t line = part; line < part + kPart; line += kLine) {
          prefetch_ahead(p + line);
          prefetch_ahead(grad + line * item_size(row.dtype[kGrad]));
          prefetch_ahead(m + line);
          prefetch_ahead(v + line);
          if (teacher != nullptr) prefetch_ahead(teacher + 4 * line);
        }
        const int64_t end = std::min(block, part + kPart);
        for (int64_t i = part; i < end; ++i) adamw_element(p[i], g[i], m[i], v[i], s);
      }
      if (row.address[kCopy] != nullptr) store(row.dtype[kCopy], p, at(kCopy), block, past_caches);
      if (teacher == nullptr) continue;
      float* __restrict t = reinterpret_cast<float*>(at(kTeacher));
      for (int64_t i = 0; i < block; ++i) t[i] = lerp(t[i], p[i], s.weight);
      if (row.address[kTeacherCopy] != nullptr) {
        store(row.dtype[kTeacherCopy], t, at(kTeacherCopy), block, past_caches);
      }
    }
  }
};

void adamw_ema_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> teachers, std::vector<int64_t> taught,
                std::vector<Tensor> copies, std::vector<int64_t> copied, std::vector<Tensor> teacher_copies,
                std::vector<int64_t> teacher_copied, Optional found_inf, Optional clip_tensor, Optional decay_tensor,
                Optional step_tensor, Optional lr_tensor, double clip, double decay, double step, double lr,
                double beta1, double beta2, double eps, double weight_decay, bool fairseq) {
  const char* op = "adamw_ema";
  Rows<kColumns> rows(op, {{{"params", params, nullptr, true, true},
                            {"grads", grads, nullptr, false, false},
                            {"exp_avgs", exp_avgs, nullptr, true, true},
                            {"exp_avg_sqs", exp_avg_sqs, nullptr, true, true},
                            {"teachers", teachers, &taught, true, true},
                            {"copies", copies, &copied, true, false},
                            {"teacher_copies", teacher_copies, &teacher_copied, true, false}}});
  for (int64_t row : teacher_copied) {
    D2V_CHECK(std::find(taught.begin(), taught.end(), row) != taught.end(), op,
              ": teacher_copies must belong to teachers, got one in row ", row);
  }
  if (read_number(op, "found_inf", found_inf, 0.0) != 0.0) return;
  const AdamWScalars scalars = adamw_scalars(
      read_number(op, "clip_factor", clip_tensor, clip), read_number(op, "ema_decay", decay_tensor, decay),
      read_number(op, "step", step_tensor, step), read_number(op, "lr", lr_tensor, lr), beta1, beta2, eps,
      weight_decay, fairseq);
  const bool past_caches = rows.past_caches();
  rows.run([&](const Row& row, int64_t offset, int64_t count) {
    dispatch_wide<Step>(row, offset, count, scalars, past_caches);
    fence(past_caches);
  });
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CPU, m) { m.impl("adamw_ema_", TORCH_BOX(&d2v::adamw_ema_)); }
