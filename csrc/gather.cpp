// gather_tokens and scatter_tokens on a CPU: rows of D values copied once between [B, T, D] and [N, E + K, D].
//
//     gather     out[n, E + k] = (x[b, t] + positions[t]) + per_mask[n, t],  t = ids_keep[n, k], n = b M + m
//                out[n, e] = extra[e] (0 without); each sum is rounded to the dtype, where eager rounds it
//     backward   with g[n, t] = dout[n, E + slot[n, t]] where slot[n, t] >= 0, else 0:
//                dx[b, t] = sum over m of g[n, t], in fp32, in the order m = 0 .. M - 1, rounded once
//                dper_mask[n, t] = g[n, t]
//                dpositions[t], dextra[e] = sums over n in fp64, in the order of n, rounded once
//                what ids_keep has -1 for is 0, and no slot leads to it
//     scatter    out[n, t] = x[n, E + slot[n, t]] where slot[n, t] >= 0, else noise_std normal(seed, n, t), or the
//                mask token; with keep_extra behind x[n, :E]
//     backward   a gather from one version per sample, with 0 or their own gradient for the extra tokens; of the mask
//                token the sum over the masked places in fp64, in the order of n and t, rounded once
//
// Threads share the rows of the output, each of which is written once and by one thread: no atomics, nothing is
// cleared first, and the bits do not depend on the number of threads. Rows that are copied as they are go past the
// caches where the output is larger than these (cpu.hpp). The noise is made 32 counters at a time in vectors
// (normals.cuh). fp32, fp16 or bf16; last dimensions contiguous and any other strides (what has not is copied first).
#include "cpu.hpp"
#include "normals.cuh"

namespace d2v {
namespace {

constexpr int64_t kBlock = 512;

// A row of a strided [rows, D] or [N, rows, D] tensor.
struct Table {
  Tensor tensor;  // keeps a copy alive
  const char* data = nullptr;
  int64_t outer = 0, inner = 0;  // strides in bytes

  Table() = default;
  Table(const Tensor& x, int64_t item) : tensor(dense_last(x)), data(static_cast<const char*>(tensor.data_ptr())) {
    const int64_t dims = tensor.dim();
    inner = tensor.stride(dims - 2) * item;
    outer = dims == 3 ? tensor.stride(0) * item : 0;
  }
  const char* row(int64_t n, int64_t t) const { return data + n * outer + t * inner; }
};

template <class T>
struct AddRows {
  // into = round(round(x + a) + b); a or b may be null.
  static D2V_INLINE void run(char* into, const char* x, const char* a, const char* b, int64_t width) {
    auto* __restrict out = reinterpret_cast<typename T::type*>(into);
    const auto* __restrict first = reinterpret_cast<const typename T::type*>(x);
    const auto* __restrict second = reinterpret_cast<const typename T::type*>(a != nullptr ? a : b);
    const auto* __restrict third = reinterpret_cast<const typename T::type*>(b);
    if (a != nullptr && b != nullptr) {
      for (int64_t i = 0; i < width; ++i) {
        out[i] = T::store(T::load(T::store(T::load(first[i]) + T::load(second[i]))) + T::load(third[i]));
      }
    } else {
      for (int64_t i = 0; i < width; ++i) out[i] = T::store(T::load(first[i]) + T::load(second[i]));
    }
  }
};

struct Accumulate {
  // total += values of a row
  static D2V_INLINE void run(float* __restrict total, const char* row, Dtype dtype, int64_t width) {
    float buffer[kBlock];
    for (int64_t first = 0; first < width; first += kBlock) {
      const int64_t block = std::min(kBlock, width - first);
      const float* __restrict x = values(dtype, row + first * item_size(dtype), buffer, block);
      for (int64_t i = 0; i < block; ++i) total[first + i] += x[i];
    }
  }
};

struct AccumulateWide {
  static D2V_INLINE void run(double* __restrict total, const char* row, Dtype dtype, int64_t width) {
    float buffer[kBlock];
    for (int64_t first = 0; first < width; first += kBlock) {
      const int64_t block = std::min(kBlock, width - first);
      const float* __restrict x = values(dtype, row + first * item_size(dtype), buffer, block);
      for (int64_t i = 0; i < block; ++i) total[first + i] += static_cast<double>(x[i]);
    }
  }
};

struct Store {
  static D2V_INLINE void run(char* into, const float* row, Dtype dtype, int64_t width) { store(dtype, row, into, width); }
};

struct CopyRow {
  static D2V_INLINE void run(char* into, const char* from, int64_t bytes, bool past_caches) {
    copy_row(into, from, bytes, past_caches);
  }
};

struct Noise {
  static constexpr int32_t kCounters = 32;
  // Row (n, t) of the noise; buffer holds 4 kCounters values.
  static D2V_INLINE void run(char* into, uint32_t n, uint32_t t, uint32_t k0, uint32_t k1, float noise_std, Dtype dtype,
                             int64_t width) {
    float buffer[4 * kCounters];
    for (int64_t first = 0; first < width; first += 4 * kCounters) {
      const uint32_t d4 = static_cast<uint32_t>(first / 4);
      float v0[kCounters], v1[kCounters], v2[kCounters], v3[kCounters];
      for (int32_t i = 0; i < kCounters; ++i) {
        const Normals4 normals = element_normals(d4 + static_cast<uint32_t>(i), t, n, k0, k1);
        v0[i] = normals.v[0] * noise_std;
        v1[i] = normals.v[1] * noise_std;
        v2[i] = normals.v[2] * noise_std;
        v3[i] = normals.v[3] * noise_std;
      }
      for (int32_t i = 0; i < kCounters; ++i) {
        buffer[4 * i] = v0[i];
        buffer[4 * i + 1] = v1[i];
        buffer[4 * i + 2] = v2[i];
        buffer[4 * i + 3] = v3[i];
      }
      store(dtype, buffer, into + first * item_size(dtype), std::min<int64_t>(4 * kCounters, width - first));
    }
  }
};

void add_rows(Dtype dtype, char* into, const char* x, const char* a, const char* b, int64_t width) {
  switch (dtype) {
    case kFloat32:
      return dispatch<AddRows<Float32>>(into, x, a, b, width);
    case kFloat16:
      return dispatch<AddRows<Float16>>(into, x, a, b, width);
    default:
      return dispatch<AddRows<BFloat16>>(into, x, a, b, width);
  }
}

void check_index(const char* op, const Tensor& x, const char* name) {
  check_type(op, name, x, ScalarType::Int);
  check_shape(op, name, x, {-1, -1});
}

int64_t rows_in_grain(int64_t bytes) { return 1 + 65536 / std::max<int64_t>(1, bytes); }

// x + positions, each sum once: clones read the same ones. Worth it where the conversions cost more than memory.
Tensor positioned(const Tensor& x, const Tensor& positions, Dtype dtype) {
  const int64_t item = item_size(dtype), tokens = x.size(1), width = x.size(2), bytes = width * item;
  Tensor sum = new_empty(x, {x.size(0), tokens, width});
  const Table from(x, item), place(positions, item);
  auto* into = static_cast<char*>(sum.data_ptr());
  in_threads(x.size(0) * tokens, rows_in_grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      add_rows(dtype, into + i * bytes, from.row(i / tokens, i % tokens), place.row(0, i % tokens), nullptr, width);
    }
  });
  return sum;
}

// out [N, E + K, D], as in the header; extra is [E, D] or [N, E, D], without it the first `extras` rows of each n
// become 0.
void pick(const char* op, Tensor& out, const Tensor& x, const Tensor& ids_keep, int64_t clones, int64_t extras,
          const Optional& extra, const Optional& positions, const Optional& per_mask) {
  const Dtype dtype = checked_dtype(op, "x", x);
  const int64_t item = item_size(dtype), rows = out.size(0), seen = out.size(1), width = out.size(2);
  const int64_t kept = ids_keep.size(1), tokens = x.size(1), bytes = width * item;
  if (out.numel() == 0) return;
  if (dtype != kFloat32 && positions.has_value() && ids_keep.numel() > x.size(0) * tokens) {
    return pick(op, out, positioned(x, *positions, dtype), ids_keep, clones, extras, extra, std::nullopt, per_mask);
  }
  const Tensor keep = dense(ids_keep);
  const auto* ids = static_cast<const int32_t*>(keep.data_ptr());
  const Table from(x, item);
  const Table front = extra.has_value() ? Table(*extra, item) : Table();
  const Table place = positions.has_value() ? Table(*positions, item) : Table();
  const Table own = per_mask.has_value() ? Table(*per_mask, item) : Table();
  auto* into = static_cast<char*>(out.data_ptr());
  const bool past_caches = out.numel() * item >= kPastCaches;
  std::atomic<bool> outside{false};
  in_threads(rows * seen, rows_in_grain(bytes), [&](int64_t begin, int64_t end) {
    const std::vector<char> zeros(bytes, 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / seen, s = i % seen;
      char* target = into + i * bytes;
      if (s < extras) {
        dispatch<CopyRow>(target, front.data ? front.row(n, s) : zeros.data(), bytes, past_caches);
        continue;
      }
      const int64_t t = ids[n * kept + s - extras];
      if (t < 0 || t >= tokens) {
        outside = outside || t != -1;
        dispatch<CopyRow>(target, zeros.data(), bytes, past_caches);
        continue;
      }
      const char* source = from.row(n / clones, t);
      if (place.data == nullptr && own.data == nullptr) {
        dispatch<CopyRow>(target, source, bytes, past_caches);
      } else {
        prefetch_for_writing(target, bytes);
        add_rows(dtype, target, source, place.data ? place.row(0, t) : nullptr, own.data ? own.row(n, t) : nullptr,
                 width);
      }
    }
    fence(past_caches);
  });
  D2V_CHECK(!outside, op, ": ids_keep must be >= 0 and < ", tokens, ", got one outside");
}

Tensor gather_fwd(Tensor x, Tensor ids_keep, int64_t clones, Optional extra, Optional positions, Optional per_mask) {
  const char* op = "gather_tokens";
  check_shape(op, "x", x, {-1, -1, -1});
  check_index(op, ids_keep, "ids_keep");
  const int64_t tokens = x.size(1), width = x.size(2), rows = ids_keep.size(0);
  D2V_CHECK(clones >= 1 && rows == x.size(0) * clones, op, ": ids_keep must have ", x.size(0), " * clones = ", clones,
            " rows, got ", rows);
  const auto fits = [&](const char* name, const Optional& y, std::initializer_list<int64_t> sizes) {
    if (!y.has_value()) return;
    check_shape(op, name, *y, sizes);
    check_type(op, name, *y, x.scalar_type());
    check_device(op, name, *y, x);
  };
  fits("extra", extra, {-1, width});
  fits("positions", positions, {tokens, width});
  fits("per_mask", per_mask, {rows, tokens, width});
  check_device(op, "ids_keep", ids_keep, x);
  checked_dtype(op, "x", x);
  const int64_t extras = extra.has_value() ? extra->size(0) : 0;
  Tensor out = new_empty(x, {rows, extras + ids_keep.size(1), width});
  pick(op, out, x, ids_keep, clones, extras, extra, positions, per_mask);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_bwd(Tensor dout, Tensor slot, int64_t clones, int64_t extras,
                                                      std::vector<bool> needs) {
  const char* op = "gather_tokens";
  check_shape(op, "dout", dout, {-1, -1, -1});
  check_index(op, slot, "slot");
  check_device(op, "slot", slot, dout);
  const Dtype dtype = checked_dtype(op, "dout", dout);
  const int64_t rows = slot.size(0), tokens = slot.size(1), width = dout.size(2), item = item_size(dtype);
  D2V_CHECK(clones >= 1 && rows % clones == 0 && dout.size(0) == rows, op, ": dout must have ", rows,
            " rows like slot, a multiple of clones = ", clones, ", got ", dout.size(0));
  D2V_CHECK(extras >= 0 && extras <= dout.size(1) && needs.size() == 4, op, ": extras must be >= 0 and <= ",
            dout.size(1), " and needs four, got ", extras, " and ", needs.size());
  const int64_t kept = dout.size(1) - extras, samples = rows / clones, bytes = width * item;
  const bool need_x = needs[0], need_positions = needs[2], need_rows = needs[3];
  Tensor dx = new_empty(dout, {need_x ? samples : 0, tokens, width});
  Tensor dextra = new_empty(dout, {needs[1] ? extras : 0, width});
  Tensor dpositions = new_empty(dout, {need_positions ? tokens : 0, width});
  Tensor dper_mask = new_empty(dout, {need_rows ? rows : 0, tokens, width});
  const Table from(dout, item);
  const Tensor slots = dense(slot);
  const auto* places = static_cast<const int32_t*>(slots.data_ptr());
  auto *into_x = static_cast<char*>(dx.data_ptr()), *into_positions = static_cast<char*>(dpositions.data_ptr());
  auto *into_rows = static_cast<char*>(dper_mask.data_ptr()), *into_extra = static_cast<char*>(dextra.data_ptr());
  std::atomic<bool> outside{false};

  // What arrives at token t of version n; null: it is masked.
  const auto row_of = [&](int64_t n, int64_t t) -> const char* {
    const int64_t place = places[n * tokens + t];
    if (place >= kept) outside = true;
    return place >= 0 && place < kept ? from.row(n, extras + place) : nullptr;
  };
  // Token t of samples first .. last - 1; their sum goes to `total`, if any.
  const auto tokens_of = [&](int64_t t, int64_t first, int64_t last, std::vector<float>& sum, double* total,
                             const std::vector<char>& zeros) {
    for (int64_t b = first; b < last; ++b) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      const int64_t end = (b + 1) * clones;
      const char* row = row_of(b * clones, t);
      for (int64_t n = b * clones; n < end; ++n) {
        const char* next = n + 1 < end ? row_of(n + 1, t) : nullptr;  // far from this one: asked for by hand
        if (next != nullptr) prefetch(next, bytes);
        if (row != nullptr && (need_x || total != nullptr)) dispatch<Accumulate>(sum.data(), row, dtype, width);
        if (need_rows) {
          dispatch<CopyRow>(into_rows + (n * tokens + t) * bytes, row != nullptr ? row : zeros.data(), bytes, false);
        }
        row = next;
      }
      if (need_x) dispatch<Store>(into_x + (b * tokens + t) * bytes, sum.data(), dtype, width);
      if (total != nullptr) dispatch<AccumulateWide>(total, reinterpret_cast<const char*>(sum.data()), kFloat32, width);
    }
  };
  const auto store_sum = [&](char* into, const std::vector<double>& total, std::vector<float>& sum) {
    for (int64_t i = 0; i < width; ++i) sum[i] = static_cast<float>(total[i]);
    dispatch<Store>(into, sum.data(), dtype, width);
  };
  if (need_positions) {
    in_threads(tokens, rows_in_grain(rows * bytes), [&](int64_t begin, int64_t end) {
      const std::vector<char> zeros(bytes, 0);
      std::vector<float> sum(width);
      std::vector<double> total(width);
      for (int64_t t = begin; t < end; ++t) {
        std::fill(total.begin(), total.end(), 0.0);
        tokens_of(t, 0, samples, sum, total.data(), zeros);
        store_sum(into_positions + t * bytes, total, sum);
      }
    });
  } else if (need_x || need_rows) {
    in_threads(samples * tokens, rows_in_grain(clones * bytes), [&](int64_t begin, int64_t end) {
      const std::vector<char> zeros(bytes, 0);
      std::vector<float> sum(width);
      for (int64_t i = begin; i < end; ++i) tokens_of(i % tokens, i / tokens, i / tokens + 1, sum, nullptr, zeros);
    });
  }
  if (needs[1]) {
    in_threads(extras, rows_in_grain(rows * bytes), [&](int64_t begin, int64_t end) {
      std::vector<float> sum(width);
      std::vector<double> total(width);
      for (int64_t e = begin; e < end; ++e) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t n = 0; n < rows; ++n) dispatch<AccumulateWide>(total.data(), from.row(n, e), dtype, width);
        store_sum(into_extra + e * bytes, total, sum);
      }
    });
  }
  D2V_CHECK(!outside, op, ": slot must be < ", kept, ", got one outside");
  return {dx, dextra, dpositions, dper_mask};
}

Tensor scatter_fwd(Tensor x, Tensor slot, int64_t extras, double noise_std, Optional seed, std::vector<int64_t> key,
                   Optional mask_token, bool keep_extra) {
  const char* op = "scatter_tokens";
  check_shape(op, "x", x, {-1, -1, -1});
  check_index(op, slot, "slot");
  check_device(op, "slot", slot, x);
  const Dtype dtype = checked_dtype(op, "x", x);
  const int64_t rows = slot.size(0), tokens = slot.size(1), width = x.size(2), item = item_size(dtype);
  D2V_CHECK(x.size(0) == rows, op, ": x must have ", rows, " rows like slot, got ", x.size(0));
  D2V_CHECK(extras >= 0 && extras <= x.size(1) && key.size() == 2, op, ": extras must be >= 0 and <= ", x.size(1),
            " and words two, got ", extras, " and ", key.size());
  uint64_t seed_word = static_cast<uint64_t>(key[1]) << 32 | (static_cast<uint64_t>(key[0]) & 0xFFFFFFFFu);
  if (seed.has_value()) {
    check_type(op, "seed", *seed, ScalarType::Long);
    D2V_CHECK(seed->is_cpu() && seed->numel() == 1, op, ": seed must be one number of the CPU");
    seed_word = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  }
  const uint32_t k0 = static_cast<uint32_t>(seed_word), k1 = static_cast<uint32_t>(seed_word >> 32);
  const float scale = static_cast<float>(noise_std);
  Tensor token;
  if (mask_token.has_value()) {
    check_shape(op, "mask_token", *mask_token, {width});
    check_type(op, "mask_token", *mask_token, x.scalar_type());
    check_device(op, "mask_token", *mask_token, x);
    token = dense(*mask_token);
  }
  const bool noisy = noise_std > 0.0 && !mask_token.has_value();
  const int64_t front = keep_extra ? extras : 0, length = front + tokens;
  Tensor out = new_empty(x, {rows, length, width});
  if (out.numel() == 0) return out;
  const Table from(x, item);
  const Tensor slots = dense(slot);
  const auto* places = static_cast<const int32_t*>(slots.data_ptr());
  const int64_t kept = x.size(1) - extras, bytes = width * item;
  auto* into = static_cast<char*>(out.data_ptr());
  const bool past_caches = out.numel() * item >= kPastCaches;
  std::atomic<bool> outside{false};
  in_threads(rows * length, rows_in_grain(16 * bytes), [&](int64_t begin, int64_t end) {
    std::vector<char> row(bytes, 0);
    if (mask_token.has_value()) std::memcpy(row.data(), token.data_ptr(), bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / length, t = i % length - front, place = t < 0 ? t + front - extras : places[n * tokens + t];
      const char* source = row.data();
      if (place >= kept) {
        outside = true;
      } else if (t < 0 || place >= 0) {
        source = from.row(n, extras + place);
      } else if (noisy) {
        dispatch<Noise>(row.data(), static_cast<uint32_t>(n), static_cast<uint32_t>(t), k0, k1, scale, dtype, width);
      }
      dispatch<CopyRow>(into + i * bytes, source, bytes, past_caches);
    }
    fence(past_caches);
  });
  D2V_CHECK(!outside, op, ": slot must be < ", kept, ", got one outside");
  return out;
}

Tensor scatter_bwd(Tensor dout, Tensor ids_keep, int64_t extras, Optional dextra) {
  const char* op = "scatter_tokens";
  check_shape(op, "dout", dout, {-1, -1, -1});
  check_index(op, ids_keep, "ids_keep");
  check_device(op, "ids_keep", ids_keep, dout);
  checked_dtype(op, "dout", dout);
  D2V_CHECK(ids_keep.size(0) == dout.size(0) && extras >= 0, op, ": ids_keep must have ", dout.size(0),
            " rows like dout and extras be >= 0, got ", ids_keep.size(0), " and ", extras);
  if (dextra.has_value()) {
    check_shape(op, "dextra", *dextra, {dout.size(0), extras, dout.size(2)});
    check_type(op, "dextra", *dextra, dout.scalar_type());
    check_device(op, "dextra", *dextra, dout);
  }
  Tensor dx = new_empty(dout, {ids_keep.size(0), extras + ids_keep.size(1), dout.size(2)});
  pick(op, dx, dout, ids_keep, 1, extras, dextra, std::nullopt, std::nullopt);
  return dx;
}

Tensor mask_token_bwd(Tensor dout, Tensor slot) {
  const char* op = "scatter_tokens";
  check_shape(op, "dout", dout, {-1, -1, -1});
  check_index(op, slot, "slot");
  check_device(op, "slot", slot, dout);
  const Dtype dtype = checked_dtype(op, "dout", dout);
  const int64_t rows = slot.size(0), tokens = slot.size(1), width = dout.size(2);
  D2V_CHECK(dout.size(0) == rows && dout.size(1) == tokens, op, ": dout must have ", rows, " rows of ", tokens,
            " tokens like slot, got ", dout.size(0), " of ", dout.size(1));
  Tensor dtoken = new_empty(dout, {width});
  if (width == 0) return dtoken;
  const Table from(dout, item_size(dtype));
  const Tensor slots = dense(slot);
  const auto* places = static_cast<const int32_t*>(slots.data_ptr());
  // As many partial sums as the shape says, however many threads make them.
  const int64_t each = std::max<int64_t>(64, (rows * tokens + 255) / 256), parts = (rows * tokens + each - 1) / each;
  std::vector<double> sums(static_cast<size_t>(parts * width), 0.0);
  in_threads(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t i = part * each; i < std::min((part + 1) * each, rows * tokens); ++i) {
        if (places[i] >= 0) continue;
        dispatch<AccumulateWide>(sums.data() + part * width, from.row(i / tokens, i % tokens), dtype, width);
      }
    }
  });
  std::vector<float> total(static_cast<size_t>(width));
  for (int64_t d = 0; d < width; ++d) {
    double sum = 0.0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * width + d];
    total[d] = static_cast<float>(sum);
  }
  dispatch<Store>(static_cast<char*>(dtoken.data_ptr()), total.data(), dtype, width);
  return dtoken;
}

}  // namespace
}  // namespace d2v

STABLE_TORCH_LIBRARY_IMPL(d2vkern_native, CPU, m) {
  m.impl("gather_fwd", TORCH_BOX(&d2v::gather_fwd));
  m.impl("gather_bwd", TORCH_BOX(&d2v::gather_bwd));
  m.impl("scatter_fwd", TORCH_BOX(&d2v::scatter_fwd));
  m.impl("scatter_bwd", TORCH_BOX(&d2v::scatter_bwd));
  m.impl("mask_token_bwd", TORCH_BOX(&d2v::mask_token_bwd));
}
