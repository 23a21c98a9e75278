// gather_tokens and scatter_tokens: rows copied once between [B, T, D] and [N, E + K, D], n = b M + m.
//
//     gather     out[n, E + k] = (x[b, t] + positions[t]) + per_mask[n, t],  t = ids_keep[n, k]
//                out[n, e] = extra[e]; each sum is rounded to the dtype, where eager rounds it
//     backward   with g[n, t] = dout[n, E + slot[n, t]] where slot[n, t] >= 0, else 0:
//                dx[b, t] = sum over m of g[n, t], in fp32, in the order m = 0 .. M - 1, rounded once
//                dper_mask[n, t] = g[n, t]
//                dpositions[t], dextra[e] = sums over n, in fp32, in an order that the shapes alone fix
//                what ids_keep has -1 for is 0, and no slot leads to it
//     scatter    out[n, t] = x[n, E + slot[n, t]] where slot[n, t] >= 0, else noise_std normal(seed, n, t), or the
//                mask token; with keep_extra behind x[n, :E]
//     backward   a gather from one version per sample, with 0 or their own gradient for the extra tokens; of the mask
//                token the sum over the masked places, in fp32, in an order that the shapes alone fix
//
// Layout: contiguous last dimensions and any other strides (what has not is copied first); outputs are contiguous.
// A warp makes a row, in 16-byte accesses where addresses, strides and widths allow, else element by element. Bytes as
// at the floor, in rows of D: gather reads B T + E + T (positions) + N K (per_mask) and writes N (E + K); its backward
// reads N (E + K) and writes B T + N T (dper_mask), plus partial sums; scatter reads N K and writes N T. Kernels:
// gather_rows.cuh, scatter_rows.cuh.
#include "cuda_check.cuh"
#include "gather_rows.cuh"
#include "scatter_rows.cuh"

namespace d2v {
namespace {

using MaybeTensor = std::optional<Tensor>;

// A tensor's address and the strides between its rows, for the choice of a width.
class Places {
 public:
  explicit Places(int64_t item) : item_(item) {}
  void tensor(const Tensor& x) {
    all_ |= reinterpret_cast<uintptr_t>(x.const_data_ptr());
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      // Where there is one row there is no stride to it.
      if (x.size(i) > 1) all_ |= static_cast<uint64_t>(x.stride(i) * item_);
    }
    all_ |= static_cast<uint64_t>(x.size(x.dim() - 1) * item_);
  }
  bool wide() const { return widest_access(all_) == 16; }

 private:
  int64_t item_;
  uint64_t all_ = 0;
};

// Calls body(T{}, std::integral_constant<int32_t, kVector>{}) for a dtype and whether accesses take 16 bytes.
template <class Body>
void for_dtype(const char* op, const Tensor& x, bool wide, Body body) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) {
    wide ? body(float{}, std::integral_constant<int32_t, 4>{}) : body(float{}, std::integral_constant<int32_t, 1>{});
  } else if (type == ScalarType::Half) {
    wide ? body(Fp16{}, std::integral_constant<int32_t, 8>{}) : body(Fp16{}, std::integral_constant<int32_t, 1>{});
  } else if (type == ScalarType::BFloat16) {
    wide ? body(Bf16{}, std::integral_constant<int32_t, 8>{}) : body(Bf16{}, std::integral_constant<int32_t, 1>{});
  } else {
    STD_TORCH_CHECK(false, op, ": x must be fp32, fp16 or bf16 on backend 'native' with CUDA, got dtype number ",
                    static_cast<int>(type));
  }
}

Tensor dense_columns(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : contiguous(x);
}

void check_rows(const char* op, const char* name, const Tensor& x, const Tensor& like,
                const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the device of the others");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the others");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), op, ": ", name, " must have ", shape.size(),
                  " dimensions, got ", x.dim());
  for (size_t i = 0; i < shape.size(); ++i) {
    STD_TORCH_CHECK(shape[i] < 0 || x.size(static_cast<int64_t>(i)) == shape[i], op, ": ", name, " must have size ",
                    shape[i], " in dimension ", i, ", got ", x.size(static_cast<int64_t>(i)));
  }
}

// ids_keep or slot, which the kernels index as they are.
Tensor check_index(const char* op, const char* name, const Tensor& index, const Tensor& like) {
  STD_TORCH_CHECK(index.is_cuda() && index.get_device_index() == like.get_device_index() && index.dim() == 2 &&
                      index.scalar_type() == ScalarType::Int,
                  op, ": ", name, " must be a 2-dim int32 tensor on the device of the others");
  return contiguous(index);
}

// Sizes that kernels hold in 32 bits.
void check_sizes(const char* op, const std::vector<int64_t>& sizes) {
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0 && size <= 0x7FFFFFFF, op, ": sizes must be below 2^31 each, got ", size);
  }
}

template <class T>
const T* pointer_of(const MaybeTensor& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T>
T* output_of(const MaybeTensor& x) {
  return x.has_value() ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

int64_t stride_of(const MaybeTensor& x, int64_t dimension) { return x.has_value() ? x->stride(dimension) : 0; }

// Writes out [N, E + K, D]; extra is [E, D] or [N, E, D], without it the first rows become 0.
void pick(const char* op, Tensor& out, const Tensor& x_given, const Tensor& ids, int64_t clones,
          const MaybeTensor& extra_given, const MaybeTensor& positions_given, const MaybeTensor& per_mask_given) {
  const Tensor x = dense_columns(x_given);
  Places places(static_cast<int64_t>(x.element_size()));
  places.tensor(x);
  places.tensor(out);
  MaybeTensor extra, positions, per_mask;
  if (extra_given.has_value()) places.tensor(*(extra = dense_columns(*extra_given)));
  if (positions_given.has_value()) places.tensor(*(positions = dense_columns(*positions_given)));
  if (per_mask_given.has_value()) places.tensor(*(per_mask = dense_columns(*per_mask_given)));
  const int64_t rows = out.size(0), seen = out.size(1), width = out.size(2), kept = ids.size(1);
  check_sizes(op, {rows, seen, width, x.size(1)});
  if (width == 0) return;
  const OnDeviceOf device(out);
  for_dtype(op, x, places.wide(), [&](auto element, auto vector) {
    using T = decltype(element);
    GatherArguments<T> args = {};
    args.x = static_cast<const T*>(x.const_data_ptr());
    args.ids = static_cast<const int32_t*>(ids.const_data_ptr());
    args.extra = pointer_of<T>(extra);
    args.positions = pointer_of<T>(positions);
    args.per_mask = pointer_of<T>(per_mask);
    args.out = static_cast<T*>(out.mutable_data_ptr());
    args.x_stride_b = x.stride(0);
    args.x_stride_t = x.stride(1);
    const bool per_row = extra.has_value() && extra->dim() == 3;
    args.extra_stride_n = per_row ? extra->stride(0) : 0;
    args.extra_stride_e = stride_of(extra, per_row ? 1 : 0);
    args.positions_stride = stride_of(positions, 0);
    args.per_mask_stride_n = stride_of(per_mask, 0);
    args.per_mask_stride_t = stride_of(per_mask, 1);
    args.rows = static_cast<int32_t>(rows);
    args.kept = static_cast<int32_t>(kept);
    args.extras = static_cast<int32_t>(seen - kept);
    args.width = static_cast<int32_t>(width);
    args.clones = static_cast<int32_t>(clones);
    start(op, rows_grid(rows, seen), device.stream(), gather_fwd_kernel<T, decltype(vector)::value>, args);
  });
}

Tensor gather_fwd(const Tensor& x, const Tensor& ids_keep, int64_t clones, const MaybeTensor& extra,
                  const MaybeTensor& positions, const MaybeTensor& per_mask) {
  const char* op = "gather";
  check_rows(op, "x", x, x, {-1, -1, -1});
  const Tensor ids = check_index(op, "ids_keep", ids_keep, x);
  const int64_t rows = ids.size(0), tokens = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(clones >= 1 && x.size(0) * clones == rows, op, ": ids_keep must have clones = ", clones,
                  " rows per sample, got ", rows, " for ", x.size(0), " samples");
  if (extra.has_value()) check_rows(op, "extra", *extra, x, {-1, width});
  if (positions.has_value()) check_rows(op, "positions", *positions, x, {tokens, width});
  if (per_mask.has_value()) check_rows(op, "per_mask", *per_mask, x, {rows, tokens, width});
  const int64_t extras = extra.has_value() ? extra->size(0) : 0;
  Tensor out = new_empty(x, {rows, extras + ids.size(1), width});
  pick(op, out, x, ids, clones, extra, positions, per_mask);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_bwd(const Tensor& dout_given, const Tensor& slot_given,
                                                      int64_t clones, int64_t extras, const std::vector<bool>& needs) {
  const char* op = "gather";
  check_rows(op, "dout", dout_given, dout_given, {-1, -1, -1});
  const Tensor slot = check_index(op, "slot", slot_given, dout_given);
  STD_TORCH_CHECK(needs.size() == 4, op, ": needs must have 4 flags, got ", needs.size());
  const int64_t rows = slot.size(0), tokens = slot.size(1), width = dout_given.size(2);
  STD_TORCH_CHECK(clones >= 1 && rows % clones == 0 && dout_given.size(0) == rows && extras >= 0 &&
                      extras <= dout_given.size(1),
                  op, ": dout must have the ", rows, " rows of slot, a multiple of clones = ", clones,
                  ", and at least ", extras, " extra tokens, got ", dout_given.size(0), " and ", dout_given.size(1));
  check_sizes(op, {rows, tokens, extras + tokens, width});
  const int64_t samples = rows / clones;
  const bool need_x = needs[0], need_extra = needs[1], need_positions = needs[2], need_per_mask = needs[3];
  Tensor dx = new_empty(dout_given, {need_x ? samples : 0, tokens, width});
  Tensor dextra = new_empty(dout_given, {need_extra ? extras : 0, width});
  Tensor dpositions = new_empty(dout_given, {need_positions ? tokens : 0, width});
  Tensor dper_mask = new_empty(dout_given, {need_per_mask ? rows : 0, tokens, width});
  if (width == 0) return {dx, dextra, dpositions, dper_mask};

  const BackwardRows plan =
      backward_rows(samples, tokens, extras, need_x, need_extra, need_positions, need_per_mask);
  MaybeTensor sums;
  if (plan.summed > 0) sums = new_empty(dout_given, {plan.groups, plan.summed, width}, ScalarType::Float);
  const Tensor dout = dense_columns(dout_given);
  Places places(static_cast<int64_t>(dout.element_size()));
  places.tensor(dout);
  const OnDeviceOf device(dout);
  for_dtype(op, dout, places.wide(), [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int32_t kVector = decltype(vector)::value;
    GatherGradients<T> args = {};
    args.dout = static_cast<const T*>(dout.const_data_ptr());
    args.slot = static_cast<const int32_t*>(slot.const_data_ptr());
    args.dx = need_x ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
    args.dper_mask = need_per_mask ? static_cast<T*>(dper_mask.mutable_data_ptr()) : nullptr;
    args.sums = output_of<float>(sums);
    args.dout_stride_n = dout.stride(0);
    args.dout_stride_s = dout.stride(1);
    args.groups = static_cast<int32_t>(plan.groups);
    args.group = static_cast<int32_t>(plan.group);
    args.samples = static_cast<int32_t>(samples);
    args.clones = static_cast<int32_t>(clones);
    args.tokens = static_cast<int32_t>(tokens);
    args.extras = static_cast<int32_t>(extras);
    args.width = static_cast<int32_t>(width);
    args.first = static_cast<int32_t>(plan.first);
    args.visited = static_cast<int32_t>(plan.visited);
    args.summed = static_cast<int32_t>(plan.summed);
    const int64_t parts = ceil_div(width / kVector, kWarp);
    start(op, rows_grid(plan.groups, plan.visited * parts), device.stream(), gather_bwd_kernel_rows<T, kVector>, args);
    if (plan.summed == 0) return;
    T *low = static_cast<T*>(dextra.mutable_data_ptr()), *high = static_cast<T*>(dpositions.mutable_data_ptr());
    constexpr int32_t kSumVector = kVector < 4 ? 1 : 4;
    start(op, sums_grid(plan.summed * width), device.stream(), gather_bwd_kernel_sums<T, kSumVector>,
          pointer_of<float>(sums), low, high, plan.groups, plan.summed * width, need_extra ? extras * width : 0);
  });
  return {dx, dextra, dpositions, dper_mask};
}

Tensor scatter_fwd(const Tensor& x_given, const Tensor& slot_given, int64_t extras, double noise_std,
                   const MaybeTensor& seed, const std::vector<int64_t>& words, const MaybeTensor& mask_token,
                   bool keep_extra) {
  const char* op = "scatter";
  check_rows(op, "x", x_given, x_given, {-1, -1, -1});
  const Tensor slot = check_index(op, "slot", slot_given, x_given);
  STD_TORCH_CHECK(slot.size(0) == x_given.size(0) && extras >= 0 && extras <= x_given.size(1), op,
                  ": x must have the ", slot.size(0), " rows of slot and at least ", extras, " extra tokens, got ",
                  x_given.size(0), " and ", x_given.size(1));
  STD_TORCH_CHECK(words.size() == 2, op, ": words must have 2 numbers, got ", words.size());
  const int64_t rows = slot.size(0), tokens = slot.size(1), width = x_given.size(2);
  const int64_t front = keep_extra ? extras : 0;
  check_sizes(op, {rows, front + tokens, x_given.size(1), width});
  const Tensor x = dense_columns(x_given);
  Tensor out = new_empty(x, {rows, front + tokens, width});
  MaybeTensor token;
  if (mask_token.has_value()) {
    check_rows(op, "mask_token", *mask_token, x, {width});
    token = dense_columns(*mask_token);
  }
  if (width == 0) return out;
  Places places(static_cast<int64_t>(x.element_size()));
  places.tensor(x);
  places.tensor(out);
  if (token.has_value()) places.tensor(*token);
  const int64_t* seed_word = device_word(op, "seed", seed, x);
  const OnDeviceOf device(x);
  for_dtype(op, x, places.wide(), [&](auto element, auto vector) {
    using T = decltype(element);
    ScatterArguments<T> args = {};
    args.x = static_cast<const T*>(x.const_data_ptr());
    args.slot = static_cast<const int32_t*>(slot.const_data_ptr());
    args.seed = seed_word;
    args.token = pointer_of<T>(token);
    args.out = static_cast<T*>(out.mutable_data_ptr());
    args.x_stride_n = x.stride(0);
    args.x_stride_s = x.stride(1);
    args.seed_number = seed_of(words);
    args.rows = static_cast<int32_t>(rows);
    args.tokens = static_cast<int32_t>(tokens);
    args.extras = static_cast<int32_t>(extras);
    args.width = static_cast<int32_t>(width);
    args.front = static_cast<int32_t>(front);
    args.noise_std = noise_std > 0.0 && !token.has_value() ? static_cast<float>(noise_std) : 0.0f;
    start(op, rows_grid(rows, front + tokens), device.stream(), scatter_fwd_kernel<T, decltype(vector)::value>, args);
  });
  return out;
}

Tensor scatter_bwd(const Tensor& dout, const Tensor& ids_keep, int64_t extras, const MaybeTensor& dextra) {
  const char* op = "scatter";
  check_rows(op, "dout", dout, dout, {-1, -1, -1});
  const Tensor ids = check_index(op, "ids_keep", ids_keep, dout);
  STD_TORCH_CHECK(ids.size(0) == dout.size(0) && extras >= 0, op, ": ids_keep must have the ", dout.size(0),
                  " rows of dout, got ", ids.size(0));
  if (dextra.has_value()) check_rows(op, "dextra", *dextra, dout, {dout.size(0), extras, dout.size(2)});
  Tensor dx = new_empty(dout, {ids.size(0), extras + ids.size(1), dout.size(2)});
  pick(op, dx, dout, ids, 1, dextra, std::nullopt, std::nullopt);
  return dx;
}

Tensor mask_token_bwd(const Tensor& dout_given, const Tensor& slot_given) {
  const char* op = "scatter";
  const Tensor slot = check_index(op, "slot", slot_given, dout_given);
  const int64_t rows = slot.size(0), tokens = slot.size(1);
  check_rows(op, "dout", dout_given, dout_given, {rows, tokens, -1});
  const Tensor dout = dense_columns(dout_given);
  const int64_t width = dout.size(2), count = rows * tokens;
  check_sizes(op, {rows, tokens, width});
  Tensor dtoken = new_empty(dout, {width});
  if (width == 0) return dtoken;
  // As many partial sums as the shape says.
  const int64_t each = std::max<int64_t>(64, ceil_div(count, 1024)), parts = ceil_div(count, each);
  const Tensor sums = new_empty(dout, {parts, width}, ScalarType::Float);
  Places places(static_cast<int64_t>(dout.element_size()));
  places.tensor(dout);
  const OnDeviceOf device(dout);
  for_dtype(op, dout, places.wide(), [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int32_t kVector = decltype(vector)::value;
    MaskTokenArguments<T> args = {};
    args.dout = static_cast<const T*>(dout.const_data_ptr());
    args.slot = static_cast<const int32_t*>(slot.const_data_ptr());
    args.sums = static_cast<float*>(sums.mutable_data_ptr());
    args.dout_stride_n = dout.stride(0);
    args.dout_stride_t = dout.stride(1);
    args.places = count;
    args.tokens = static_cast<int32_t>(tokens);
    args.width = static_cast<int32_t>(width);
    args.each = static_cast<int32_t>(each);
    args.parts = static_cast<int32_t>(parts);
    const int64_t chunks = ceil_div(width / kVector, kWarp);
    if (parts > 0) start(op, rows_grid(1, parts * chunks), device.stream(), mask_token_bwd_kernel<T, kVector>, args);
    T* low = static_cast<T*>(dtoken.mutable_data_ptr());
    constexpr int32_t kSumVector = kVector < 4 ? 1 : 4;
    start(op, sums_grid(width), device.stream(), gather_bwd_kernel_sums<T, kSumVector>,
          static_cast<const float*>(sums.const_data_ptr()), low, low, parts, width, width);
  });
  return dtoken;
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CUDA, m) {
  m.impl("gather_fwd", TORCH_BOX(&d2v::gather_fwd));
  m.impl("gather_bwd", TORCH_BOX(&d2v::gather_bwd));
  m.impl("scatter_fwd", TORCH_BOX(&d2v::scatter_fwd));
  m.impl("scatter_bwd", TORCH_BOX(&d2v::scatter_bwd));
  m.impl("mask_token_bwd", TORCH_BOX(&d2v::mask_token_bwd));
}
