// Launcher of AdamW with moving average and copies; kernel: adamw_ema_kernel.cuh.
#include "adamw_ema_kernel.cuh"
#include "table_check.cuh"

namespace d2v {
namespace {

void adamw_ema_chunks_(const Tensor& table, int64_t programs, int64_t chunk, const std::vector<int64_t>& kinds,
                       const std::optional<Tensor>& found_inf, const std::optional<Tensor>& clip_tensor,
                       const std::optional<Tensor>& decay_tensor, const std::optional<Tensor>& step_tensor,
                       const std::optional<Tensor>& lr_tensor, double clip, double decay, double step, double lr,
                       double beta1, double beta2, double eps, double weight_decay, bool fairseq) {
  const char* op = "adamw_ema";
  check_table(op, table, programs, chunk);
  const Kinds packed = kinds_of(op, kinds, 7, {0, 2, 3, 4});
  const OnDeviceOf device(table);
  const int32_t index = table.get_device_index();
  Settings settings = {};
  settings.scalars = adamw_scalars(clip, decay, step, lr, beta1, beta2, eps, weight_decay, fairseq);
  settings.found_inf = device_scalar(op, "found_inf", found_inf, index);
  settings.clip = device_scalar(op, "clip_factor", clip_tensor, index);
  settings.decay = device_scalar(op, "ema_decay", decay_tensor, index);
  settings.step = device_scalar(op, "step", step_tensor, index);
  settings.lr = device_scalar(op, "lr", lr_tensor, index);
  const double numbers[] = {clip, decay, step, lr, beta1, beta2, eps, weight_decay};
  std::copy(numbers, numbers + 8, settings.numbers);
  settings.fairseq = fairseq;
  start(op, table_grid(programs), device.stream(), adamw_ema_fwd_kernel,
        static_cast<const int64_t*>(table.const_data_ptr()), static_cast<int32_t>(chunk), packed, settings);
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CUDA, m) {
  m.impl("adamw_ema_chunks_", TORCH_BOX(&d2v::adamw_ema_chunks_));
}
