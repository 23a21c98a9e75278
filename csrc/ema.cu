// Launcher of the moving average; kernel: ema_kernel.cuh.
#include "ema_kernel.cuh"
#include "table_check.cuh"

namespace d2v {
namespace {

void ema_update_chunks_(const Tensor& table, int64_t programs, int64_t chunk, const std::vector<int64_t>& kinds,
                        double decay, const std::optional<Tensor>& decay_tensor) {
  check_table("ema", table, programs, chunk);
  const Kinds packed = kinds_of("ema", kinds, 3, {0});
  const OnDeviceOf device(table);
  const DeviceScalar scalar = device_scalar("ema", "decay", decay_tensor, table.get_device_index());
  start("ema", table_grid(programs), device.stream(), ema_fwd_kernel,
        static_cast<const int64_t*>(table.const_data_ptr()), static_cast<int32_t>(chunk), packed, scalar,
        weight_of(decay));
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CUDA, m) {
  m.impl("ema_update_chunks_", TORCH_BOX(&d2v::ema_update_chunks_));
}
