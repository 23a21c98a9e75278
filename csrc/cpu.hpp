// How the CPU kernels are run: instruction sets chosen while running, threads, conversions of 16-bit floats.
//
// One library serves every x86-64: what a kernel does to a span of memory is a struct with an always-inlined
// `run`, compiled once for the baseline and once for AVX2, and `dispatch` takes the better one; `dispatch_wide`
// knows AVX-512, too, for what makes more than a load and a store of each value. The compiler vectorises;
// contraction to fused multiply-adds is off, so all versions give the same bits. Copies are bound by memory, and
// the philox rounds by the multiplier's 256 bits. Elsewhere (arm64) the baseline is all there is.
#pragma once

#include "checks.hpp"
#include "host_device.cuh"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define D2V_INLINE inline __attribute__((always_inline))

// Older compilers know neither the name of its bf16 instructions nor how to ask for whole vectors.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#define D2V_HAS_AVX512 1
#else
#define D2V_HAS_AVX512 0
#endif

namespace d2v {

// 0 baseline, 1 AVX2, 2 AVX-512 of processors that do not slow down for it (those with its bf16 instructions); what
// the processor has, unless the op `cpu_level` has lowered it.
int32_t cpu_level();

template <class Body, class... Arguments>
__attribute__((noinline)) void run_baseline(const Arguments&... arguments) {
  Body::run(arguments...);
}

#if defined(__x86_64__)
template <class Body, class... Arguments>
__attribute__((noinline, target("avx2,fma,f16c,bmi2"))) void run_avx2(const Arguments&... arguments) {
  Body::run(arguments...);
}
#endif

#if D2V_HAS_AVX512
template <class Body, class... Arguments>
__attribute__((noinline, target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void
run_avx512(const Arguments&... arguments) {
  Body::run(arguments...);
}
#endif

template <class Body, class... Arguments>
void dispatch(const Arguments&... arguments) {
#if defined(__x86_64__)
  if (cpu_level() > 0) return run_avx2<Body>(arguments...);
#endif
  run_baseline<Body>(arguments...);
}

template <class Body, class... Arguments>
void dispatch_wide(const Arguments&... arguments) {
#if D2V_HAS_AVX512
  if (cpu_level() > 1) return run_avx512<Body>(arguments...);
#endif
  dispatch<Body>(arguments...);
}

// Storage of each dtype, and branch-free conversions that vectorise. Rounding is to nearest even.
struct Float32 {
  using type = float;
  static D2V_INLINE float load(float x) { return x; }
  static D2V_INLINE float store(float x) { return x; }
};

struct BFloat16 {
  using type = uint16_t;
  static D2V_INLINE float load(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
  static D2V_INLINE uint16_t store(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
};

struct Float16 {
  using type = uint16_t;
  static D2V_INLINE float load(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, rest = x & 0x7FFFu;
    // Normal: the exponent moves by 112; inf and NaN: by twice as much.
    const float normal = float_of((rest << 13) + (0x70u << 23));
    const float special = float_of((rest << 13) + (0xE0u << 23));
    // Subnormal: rest * 2^-24, exact as the difference of two numbers of exponent -1.
    const float subnormal = float_of(rest | 0x3F000000u) - 0.5f;
    const uint32_t large = rest < 0x7C00u ? bits_of(normal) : bits_of(special);
    const uint32_t magnitude = rest < 0x0400u ? bits_of(subnormal) : large;
    return float_of(sign | magnitude);
  }
  static D2V_INLINE uint16_t store(float x) {
    const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    // Normal: rounded at bit 13 with the exponent moved; carries run into the exponent and up to inf.
    const uint32_t normal = (magnitude - (0x70u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 rounds to a multiple of 2^-24.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
    out = magnitude >= 0x47800000u ? (magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u) : out;
    return static_cast<uint16_t>(sign | out);
  }
};

template <class T>
D2V_INLINE void widen(const void* from, float* __restrict into, int64_t count) {
  const auto* __restrict source = static_cast<const typename T::type*>(from);
  for (int64_t i = 0; i < count; ++i) into[i] = T::load(source[i]);
}

template <class T>
D2V_INLINE void narrow(const float* __restrict from, void* into, int64_t count) {
  auto* __restrict target = static_cast<typename T::type*>(into);
  for (int64_t i = 0; i < count; ++i) target[i] = T::store(from[i]);
}

// `count` values of a tensor's memory as fp32: the memory itself, or `buffer` with what it holds.
D2V_INLINE const float* values(Dtype dtype, const void* from, float* buffer, int64_t count) {
  if (dtype == kFloat32) return static_cast<const float*>(from);
  if (dtype == kBFloat16) {
    widen<BFloat16>(from, buffer, count);
  } else {
    widen<Float16>(from, buffer, count);
  }
  return buffer;
}

D2V_INLINE void store(Dtype dtype, const float* from, void* into, int64_t count) {
  if (dtype == kFloat32) {
    std::memcpy(into, from, 4 * count);
  } else if (dtype == kBFloat16) {
    narrow<BFloat16>(from, into, count);
  } else {
    narrow<Float16>(from, into, count);
  }
}

// A core's own prefetching leaves part of its bandwidth unused, most of all where several arrays are walked at once
// or much is written. These ask for what comes kAhead bytes later; beyond the end of an array that does nothing.
constexpr int64_t kAhead = 2048;
constexpr int64_t kLine = 16;  // fp32 values of a cache line
constexpr int64_t kPart = 64;  // values that a loop does between asking: one of kLine alone is not vectorised

D2V_INLINE void prefetch_ahead(const void* address) { __builtin_prefetch(static_cast<const char*>(address) + kAhead); }

D2V_INLINE void prefetch_for_writing(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + kAhead + i, 1, 2);
}

// A row itself, before it is read.
D2V_INLINE void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// Copies a row; past the caches, where the whole output is larger than they are: a line that is written as a
// whole is then not read first.
D2V_INLINE void copy_row(void* into, const void* from, int64_t bytes, bool past_caches) {
#if defined(__x86_64__)
  if (past_caches && reinterpret_cast<uintptr_t>(into) % 16 == 0) {
    auto* target = static_cast<__m128i*>(into);
    const auto* source = static_cast<const __m128i*>(from);
    const int64_t whole = bytes / 16;
    for (int64_t i = 0; i < whole; ++i) _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
    into = target + whole;
    from = source + whole;
    bytes -= 16 * whole;
  }
#endif
  prefetch_for_writing(into, bytes);
  std::memcpy(into, from, bytes);
}

// `store`, past the caches where the whole output is larger than they are.
D2V_INLINE void store(Dtype dtype, const float* from, void* into, int64_t count, bool past_caches) {
  if (!past_caches) return store(dtype, from, into, count);
  constexpr int64_t kNarrowed = 512;
  alignas(16) uint16_t narrowed[kNarrowed];
  for (int64_t first = 0; first < count; first += kNarrowed) {
    const int64_t part = std::min(kNarrowed, count - first), bytes = part * item_size(dtype);
    const void* source = from + first;
    if (dtype != kFloat32) {
      store(dtype, from + first, narrowed, part);
      source = narrowed;
    }
    copy_row(static_cast<char*>(into) + first * item_size(dtype), source, bytes, true);
  }
}

// Before another thread reads what was written past the caches.
D2V_INLINE void fence(bool past_caches) {
#if defined(__x86_64__)
  if (past_caches) _mm_sfence();
#endif
}

constexpr int64_t kPastCaches = int64_t{32} << 20;  // bytes of an output

// `body(begin, end)` over [0, count), in threads when there are `grain` or more.
template <class Function>
void in_threads(int64_t count, int64_t grain, const Function& body) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain), body);
}

// Any 0-dim floating or int64 tensor of the CPU, as fp64.
double read_number(const char* op, const char* name, const Tensor& x);

inline double read_number(const char* op, const char* name, const Optional& x, double otherwise) {
  return x.has_value() ? read_number(op, name, *x) : otherwise;
}

}  // namespace d2v
