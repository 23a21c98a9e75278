// The extension's schemas, once, and what it says of itself.
//
// Namespace d2vkern_native: torch allows one definition of an op, and d2vkern:: holds those that Python
// registers. No `str` argument: torch's conversion leaks it (targets 2.10 to 2.13). Kernels are registered beside
// their code, csrc/<stem>.cpp for the CPU and csrc/<stem>.cu for CUDA. On CUDA ema_update_ and adamw_ema_ are
// registered from Python, which keeps the table of addresses (kernels/_table.py) and calls the `_chunks_` ops.
#include "cpu.hpp"

#ifndef D2V_VERSION
#error "D2V_VERSION: the version of the package that this library belongs to"
#endif

// Found in the file before it is loaded: a library of another version is left alone.
extern "C" __attribute__((used)) const char d2vkern_native_marker[] = "d2vkern-native-version=" D2V_VERSION ";";

namespace d2v {

#ifdef D2V_WITH_CUDA
int64_t cuda_runtime_version();  // cuda_info.cu
constexpr int64_t kArchitectures[] = {D2V_CUDA_ARCHITECTURES};
#endif

namespace {

int32_t best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!has || !__builtin_cpu_supports("f16c")) return 0;
#if D2V_HAS_AVX512
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && __builtin_cpu_supports("avx512bf16")) return 2;
#endif
  return 1;
#else
  return 0;
#endif
}

std::atomic<int32_t> level{-1};

// The version's three numbers, the CUDA runtime's version (13000 is 13.0; 0: without CUDA), then the compiled
// architectures: ten times the compute capability, plus 1 for code of exactly that one ("a"), plus 2 for PTX.
std::vector<int64_t> about() {
  std::vector<int64_t> facts{D2V_VERSION_NUMBERS};
#ifdef D2V_WITH_CUDA
  facts.push_back(cuda_runtime_version());
  facts.insert(facts.end(), std::begin(kArchitectures), std::end(kArchitectures));
#else
  facts.push_back(0);
#endif
  return facts;
}

// Lowers the instruction set to `wanted` (negative: the best again) and returns the one in use; for tests.
int64_t set_cpu_level(int64_t wanted) {
  const int32_t best = best_level();
  level = wanted < 0 ? best : std::min(best, static_cast<int32_t>(std::min<int64_t>(wanted, best)));
  return level;
}

}  // namespace

int32_t cpu_level() {
  int32_t known = level.load(std::memory_order_relaxed);
  if (known < 0) level = known = best_level();
  return known;
}

double read_number(const char* op, const char* name, const Tensor& x) {
  D2V_CHECK(x.is_cpu() && x.numel() == 1, op, ": ", name, " must be a number of the CPU, got ", x.numel(), " values");
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(x.data_ptr());
    case ScalarType::Float:
      return *static_cast<const float*>(x.data_ptr());
    case ScalarType::Long:
      return static_cast<double>(*static_cast<const int64_t*>(x.data_ptr()));
    case ScalarType::Half:
      return Float16::load(*static_cast<const uint16_t*>(x.data_ptr()));
    case ScalarType::BFloat16:
      return BFloat16::load(*static_cast<const uint16_t*>(x.data_ptr()));
    default:
      D2V_CHECK(false, op, ": ", name, " must be floating or int64, got ", torch::headeronly::toString(x.scalar_type()));
  }
  return 0.0;
}

}  // namespace d2v

STABLE_TORCH_LIBRARY(d2vkern_native, m) {
  m.def("about() -> int[]");
  m.def("cpu_level(int wanted) -> int");
  m.def(
      "ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor(b!)[] copies, int[] copied, float decay, "
      "Tensor? decay_tensor) -> ()");
  m.def(
      "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] teachers, int[] taught, Tensor(e!)[] copies, int[] copied, Tensor(f!)[] teacher_copies, "
      "int[] teacher_copied, Tensor? found_inf, Tensor? clip_tensor, Tensor? decay_tensor, Tensor? step_tensor, "
      "Tensor? lr_tensor, float clip, float decay, float step, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool fairseq) -> ()");
  m.def("l2_norm(Tensor[] tensors) -> Tensor");
  m.def(
      "ema_update_chunks_(Tensor table, int programs, int chunk, int[] kinds, float decay, Tensor? decay_tensor) "
      "-> ()");
  m.def(
      "adamw_ema_chunks_(Tensor table, int programs, int chunk, int[] kinds, Tensor? found_inf, "
      "Tensor? clip_tensor, Tensor? decay_tensor, Tensor? step_tensor, Tensor? lr_tensor, float clip, float decay, "
      "float step, float lr, float beta1, float beta2, float eps, float weight_decay, bool fairseq) -> ()");
  m.def(
      "masks_fwd(Tensor ids, Tensor? seed, Tensor? epoch, SymInt[] words, SymInt clones, SymInt[] grid, "
      "SymInt[] block, SymInt centres, SymInt target, bool keep_chosen) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gather_fwd(Tensor x, Tensor ids_keep, SymInt clones, Tensor? extra, Tensor? positions, Tensor? per_mask) "
      "-> Tensor");
  m.def(
      "gather_bwd(Tensor dout, Tensor slot, SymInt clones, SymInt extras, bool[] needs) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "scatter_fwd(Tensor x, Tensor slot, SymInt extras, float noise_std, Tensor? seed, SymInt[] words, "
      "Tensor? mask_token=None, bool keep_extra=False) -> Tensor");
  m.def("scatter_bwd(Tensor dout, Tensor ids_keep, SymInt extras, Tensor? dextra=None) -> Tensor");
  m.def("mask_token_bwd(Tensor dout, Tensor slot) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CompositeExplicitAutograd, m) {
  m.impl("about", TORCH_BOX(&d2v::about));
  m.impl("cpu_level", TORCH_BOX(&d2v::set_cpu_level));
}
