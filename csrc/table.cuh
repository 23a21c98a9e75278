// Kernels over pointer tables (chunks.cuh): fours of elements of any dtype, and what their launchers check.
#pragma once

#include "chunks.cuh"
#include "cuda_check.cuh"

namespace d2v {

// Four neighbouring elements in registers as they are in memory: 16 bytes of fp32, 8 of a 16-bit dtype. (16 bytes of
// those would be eight elements of a thread, and the fp32 tensors beside them would come in two accesses, each of which
// leaves every other 16 bytes of a sector to the other one.)
template <int32_t kCode>
struct Four {
  using Raw = uint2;
};
template <>
struct Four<kFp32> {
  using Raw = float4;
};

template <int32_t kCode>
__device__ __forceinline__ typename Four<kCode>::Raw load_four(uint64_t address, int64_t four) {
  return reinterpret_cast<const typename Four<kCode>::Raw*>(address)[four];
}

template <int32_t kCode>
__device__ __forceinline__ float widen_one(uint32_t bits) {
  return kCode == kFp16 ? float_of_fp16(static_cast<uint16_t>(bits)) : float_of_bf16(static_cast<uint16_t>(bits));
}

template <int32_t kCode>
__device__ __forceinline__ float4 widen(typename Four<kCode>::Raw raw) {
  if constexpr (kCode == kFp32) {
    return raw;
  } else {
    return make_float4(widen_one<kCode>(raw.x & 0xFFFFu), widen_one<kCode>(raw.x >> 16),
                       widen_one<kCode>(raw.y & 0xFFFFu), widen_one<kCode>(raw.y >> 16));
  }
}

__device__ __forceinline__ uint32_t narrow_two(float low, float high, int32_t code) {
  const uint32_t l = code == kFp16 ? fp16_of(low) : bf16_of(low), h = code == kFp16 ? fp16_of(high) : bf16_of(high);
  return l | h << 16;
}

// Four elements of a tensor whose dtype is known when the kernel runs: the same branch for a whole block.
__device__ __forceinline__ void store_four(uint64_t address, int32_t code, int64_t four, float4 x) {
  if (code == kFp32) {
    reinterpret_cast<float4*>(address)[four] = x;
  } else {
    reinterpret_cast<uint2*>(address)[four] = make_uint2(narrow_two(x.x, x.y, code), narrow_two(x.z, x.w, code));
  }
}

__device__ __forceinline__ float load_one(uint64_t address, int32_t code, int64_t at) {
  if (code == kFp32) return reinterpret_cast<const float*>(address)[at];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(address)[at];
  return code == kFp16 ? float_of_fp16(bits) : float_of_bf16(bits);
}

__device__ __forceinline__ void store_one(uint64_t address, int32_t code, int64_t at, float x) {
  if (code == kFp32) {
    reinterpret_cast<float*>(address)[at] = x;
  } else {
    reinterpret_cast<uint16_t*>(address)[at] = code == kFp16 ? fp16_of(x) : bf16_of(x);
  }
}

// The kinds of a launch from the op's flat list, one code per column. `fp32` names the columns that must be fp32 where
// there is a tensor.
inline Kinds kinds_of(const char* op, const std::vector<int64_t>& codes, int32_t columns,
                      const std::vector<int32_t>& fp32) {
  const int64_t count = static_cast<int64_t>(codes.size()) / columns;
  STD_TORCH_CHECK(count * columns == static_cast<int64_t>(codes.size()), op, ": kinds must hold ", columns,
                  " codes each, got ", codes.size(), " in all");
  STD_TORCH_CHECK(count <= kMostKinds, op, ": tensors must have at most ", kMostKinds,
                  " different combinations of dtypes, got ", count);
  Kinds kinds = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int32_t column = 0; column < columns; ++column) {
      const int64_t code = codes[static_cast<size_t>(i * columns + column)];
      STD_TORCH_CHECK(code >= kNone && code <= kBf16, op, ": kinds must be codes 0 to 3, got ", code);
      kinds.packed[i] = static_cast<uint16_t>(kinds.packed[i] | code << 2 * column);
    }
    for (const int32_t column : fp32) {
      const int32_t code = code_of(kinds.packed[i], column);
      STD_TORCH_CHECK(code == kFp32 || code == kNone, op, ": column ", column,
                      " of the table must be fp32 on CUDA, got code ", code);
    }
  }
  return kinds;
}

inline void check_table(const char* op, const Tensor& table, int64_t programs, int64_t chunk) {
  STD_TORCH_CHECK(table.is_cuda() && table.scalar_type() == ScalarType::Long && table.is_contiguous(), op,
                  ": table must be a contiguous int64 tensor on a CUDA device");
  STD_TORCH_CHECK(programs >= 0 && programs <= table.numel(), op, ": programs must be within the table's ",
                  table.numel(), " words, got ", programs);
  STD_TORCH_CHECK(chunk >= 4 && chunk % 4 == 0 && chunk <= 1 << 24, op,
                  ": chunk must be a multiple of 4 up to 2^24, got ", chunk);
}

}  // namespace d2v
