// The CUDA kernels' own source, run on a host (cuda_on_host.hpp); tensors come as addresses.
#include "cuda_on_host.hpp"

#include "adamw_ema_kernel.cuh"
#include "ema_kernel.cuh"
#include "gather_rows.cuh"
#include "masks_kernel.cuh"
#include "scatter_rows.cuh"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace {

using d2v::ceil_div;

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

d2v::DeviceScalar scalar(uint64_t address, int32_t code) { return {at<const void>(address), code}; }

d2v::Kinds kinds_of(const std::vector<uint16_t>& packed) {
  d2v::Kinds kinds = {};
  std::copy(packed.begin(), packed.end(), kinds.packed);
  return kinds;
}

void ema(uint64_t table, int64_t programs, int32_t chunk, const std::vector<uint16_t>& packed, uint64_t decay,
         int32_t decay_code, float weight) {
  const d2v::Kinds kinds = kinds_of(packed);
  host::run(d2v::table_grid(programs), false, [&] {
    d2v::ema_fwd_kernel(at<const int64_t>(table), chunk, kinds, scalar(decay, decay_code), weight);
  });
}

// numbers: clip, decay, step, lr, beta1, beta2, eps, weight_decay. tensors: found_inf, clip, decay, step, lr.
void adamw_ema(uint64_t table, int64_t programs, int32_t chunk, const std::vector<uint16_t>& packed,
               const std::vector<double>& numbers, const std::vector<std::pair<uint64_t, int32_t>>& tensors,
               bool fairseq) {
  const d2v::Kinds kinds = kinds_of(packed);
  d2v::Settings settings = {};
  const auto& x = numbers;
  settings.scalars = d2v::adamw_scalars(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], fairseq);
  d2v::DeviceScalar* const scalars[] = {&settings.found_inf, &settings.clip, &settings.decay, &settings.step,
                                        &settings.lr};
  for (size_t i = 0; i < 5; ++i) *scalars[i] = scalar(tensors[i].first, tensors[i].second);
  std::copy(x.begin(), x.end(), settings.numbers);
  settings.fairseq = fairseq;
  host::run(d2v::table_grid(programs), true,
            [&] { d2v::adamw_ema_fwd_kernel(at<const int64_t>(table), chunk, kinds, settings); });
}

// settings: height, width, centres, block height, block width, target.
void masks(uint64_t ids, int64_t ids_stride, int64_t rows, uint32_t clones, const std::vector<int32_t>& settings,
           bool keep_chosen, uint64_t seed_at, int64_t seed, uint64_t epoch_at, uint32_t epoch, uint64_t mask,
           uint64_t slot, uint64_t ids_keep) {
  const d2v::MaskShape shape = {settings[0], settings[1], settings[2], settings[3],
                                settings[4], settings[5], keep_chosen};
  const d2v::Grid grid = d2v::masks_grid(rows, shape.height * shape.width);
  host::run(grid, true, [&] {
    d2v::masks_fwd_kernel(at<const int64_t>(ids), at<const int64_t>(seed_at), at<const int64_t>(epoch_at),
                          at<uint8_t>(mask), at<int32_t>(slot), at<int32_t>(ids_keep), ids_stride, seed, epoch, clones,
                          shape, grid.shared > 0);
  });
}

// Calls body(T{}, std::integral_constant<int32_t, kVector>{}), as gather.cu does.
template <class Body>
void for_dtype(int32_t code, bool wide, Body body) {
  using One = std::integral_constant<int32_t, 1>;
  using Four = std::integral_constant<int32_t, 4>;
  using Eight = std::integral_constant<int32_t, 8>;
  if (code == d2v::kFp32) {
    wide ? body(float{}, Four{}) : body(float{}, One{});
  } else if (code == d2v::kFp16) {
    wide ? body(d2v::Fp16{}, Eight{}) : body(d2v::Fp16{}, One{});
  } else {
    wide ? body(d2v::Bf16{}, Eight{}) : body(d2v::Bf16{}, One{});
  }
}

// tensors: x, ids, extra, positions, per_mask, out. strides: x b, x t, extra n, extra e, positions, per_mask n,
// per_mask t.
// sizes: rows, kept, extras, width, clones.
void gather_fwd(int32_t code, bool wide, const std::vector<uint64_t>& tensors, const std::vector<int64_t>& strides,
                const std::vector<int32_t>& sizes) {
  for_dtype(code, wide, [&](auto element, auto vector) {
    using T = decltype(element);
    const d2v::GatherArguments<T> args = {
        at<const T>(tensors[0]), at<const int32_t>(tensors[1]), at<const T>(tensors[2]), at<const T>(tensors[3]),
        at<const T>(tensors[4]), at<T>(tensors[5]),             strides[0],              strides[1],
        strides[2],              strides[3],                    strides[4],              strides[5],
        strides[6],              sizes[0],                      sizes[1],                sizes[2],
        sizes[3],                sizes[4]};
    host::run(d2v::rows_grid(sizes[0], sizes[1] + sizes[2]), false,
              [&] { d2v::gather_fwd_kernel<T, decltype(vector)::value>(args); });
  });
}

// tensors: dout, slot, dx, dper_mask, sums, dextra, dpositions (0: not needed). sizes: samples, clones, tokens, extras,
// width.
void gather_bwd(int32_t code, bool wide, const std::vector<uint64_t>& tensors, const std::vector<int64_t>& strides,
                const std::vector<int32_t>& sizes, const std::vector<bool>& needs) {
  const int32_t samples = sizes[0], clones = sizes[1], tokens = sizes[2], extras = sizes[3], width = sizes[4];
  const d2v::BackwardRows plan =
      d2v::backward_rows(samples, tokens, extras, needs[0], needs[1], needs[2], needs[3]);
  for_dtype(code, wide, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int32_t kVector = decltype(vector)::value;
    d2v::GatherGradients<T> args = {};
    args.dout = at<const T>(tensors[0]);
    args.slot = at<const int32_t>(tensors[1]);
    args.dx = at<T>(tensors[2]);
    args.dper_mask = at<T>(tensors[3]);
    args.sums = at<float>(tensors[4]);
    args.dout_stride_n = strides[0];
    args.dout_stride_s = strides[1];
    args.groups = static_cast<int32_t>(plan.groups);
    args.group = static_cast<int32_t>(plan.group);
    args.samples = samples;
    args.clones = clones;
    args.tokens = tokens;
    args.extras = extras;
    args.width = width;
    args.first = static_cast<int32_t>(plan.first);
    args.visited = static_cast<int32_t>(plan.visited);
    args.summed = static_cast<int32_t>(plan.summed);
    const int64_t parts = ceil_div(width / kVector, d2v::kWarp);
    host::run(d2v::rows_grid(plan.groups, plan.visited * parts), false,
              [&] { d2v::gather_bwd_kernel_rows<T, kVector>(args); });
    if (plan.summed == 0) return;
    const int64_t columns = plan.summed * width, split = needs[1] ? int64_t{extras} * width : 0;
    host::run(d2v::sums_grid(columns), false, [&] {
      d2v::gather_bwd_kernel_sums<T, kVector < 4 ? 1 : 4>(args.sums, at<T>(tensors[5]), at<T>(tensors[6]), plan.groups,
                                                          columns, split);
    });
  });
}

// tensors: x, slot, seed (0: the number), token, out. sizes: rows, tokens, extras, width, front.
void scatter_fwd(int32_t code, bool wide, const std::vector<uint64_t>& tensors, const std::vector<int64_t>& strides,
                 const std::vector<int32_t>& sizes, int64_t seed, float noise_std) {
  for_dtype(code, wide, [&](auto element, auto vector) {
    using T = decltype(element);
    const d2v::ScatterArguments<T> args = {
        at<const T>(tensors[0]), at<const int32_t>(tensors[1]), at<const int64_t>(tensors[2]),
        at<const T>(tensors[3]), at<T>(tensors[4]),             strides[0],
        strides[1],              seed,                          sizes[0],
        sizes[1],                sizes[2],                      sizes[3],
        sizes[4],                noise_std};
    host::run(d2v::rows_grid(sizes[0], sizes[4] + sizes[1]), false,
              [&] { d2v::scatter_fwd_kernel<T, decltype(vector)::value>(args); });
  });
}

// tensors: dout, slot, sums, dtoken. sizes: rows, tokens, width, each.
void mask_token_bwd(int32_t code, bool wide, const std::vector<uint64_t>& tensors, const std::vector<int64_t>& strides,
                    const std::vector<int32_t>& sizes) {
  const int64_t places = int64_t{sizes[0]} * sizes[1], parts = d2v::ceil_div(places, sizes[3]);
  for_dtype(code, wide, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int32_t kVector = decltype(vector)::value;
    const d2v::MaskTokenArguments<T> args = {
        at<const T>(tensors[0]), at<const int32_t>(tensors[1]), at<float>(tensors[2]),
        strides[0],              strides[1],                    places,
        sizes[1],                sizes[2],                      sizes[3],
        static_cast<int32_t>(parts)};
    host::run(d2v::rows_grid(1, parts * d2v::ceil_div(sizes[2] / kVector, d2v::kWarp)), false,
              [&] { d2v::mask_token_bwd_kernel<T, kVector>(args); });
    host::run(d2v::sums_grid(sizes[2]), false, [&] {
      d2v::gather_bwd_kernel_sums<T, kVector < 4 ? 1 : 4>(args.sums, at<T>(tensors[3]), at<T>(tensors[3]), parts,
                                                          sizes[2], sizes[2]);
    });
  });
}

}  // namespace

PYBIND11_MODULE(kernels_host, m) {
  m.def("ema", ema);
  m.def("adamw_ema", adamw_ema);
  m.def("masks", masks);
  m.def("gather_fwd", gather_fwd);
  m.def("gather_bwd", gather_bwd);
  m.def("scatter_fwd", scatter_fwd);
  m.def("mask_token_bwd", mask_token_bwd);
}
