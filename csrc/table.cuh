// What kernels over pointer tables (chunks.cuh) share: fours of elements of any dtype, and scalars on the device.
//
// Kernels stand in headers without torch, so that the tests also run them on a host: block by block, thread by thread
// (tests/host/cuda_on_host.hpp).
#pragma once

#include "chunks.cuh"
#include "launch.cuh"

namespace d2v {

// Four neighbouring elements in registers as they are in memory: 16 bytes of fp32, 8 of a 16-bit dtype. (16 bytes of
// those would be eight elements of a thread, and the fp32 tensors beside them would come in two accesses, each of which
// leaves every other 16 bytes of a sector to the other one.) Elements are touched once: all accesses stream (.cs),
// which also says that an address out of a table is one of global memory; the compiler cannot see that.
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
  return __ldcs(reinterpret_cast<const typename Four<kCode>::Raw*>(address) + four);
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
    __stcs(reinterpret_cast<float4*>(address) + four, x);
  } else {
    const uint2 bits = make_uint2(narrow_two(x.x, x.y, code), narrow_two(x.z, x.w, code));
    __stcs(reinterpret_cast<uint2*>(address) + four, bits);
  }
}

__device__ __forceinline__ float load_one(uint64_t address, int32_t code, int64_t at) {
  if (code == kFp32) return __ldcs(reinterpret_cast<const float*>(address) + at);
  const uint16_t bits = __ldcs(reinterpret_cast<const uint16_t*>(address) + at);
  return code == kFp16 ? float_of_fp16(bits) : float_of_bf16(bits);
}

__device__ __forceinline__ void store_one(uint64_t address, int32_t code, int64_t at, float x) {
  if (code == kFp32) {
    __stcs(reinterpret_cast<float*>(address) + at, x);
  } else {
    __stcs(reinterpret_cast<uint16_t*>(address) + at, code == kFp16 ? fp16_of(x) : bf16_of(x));
  }
}

// A 0-dim tensor of any floating dtype that a kernel reads, or none.
struct DeviceScalar {
  const void* at = nullptr;
  int32_t code = kNone;

  __device__ __forceinline__ double read() const {
    if (code == kFp64) return *static_cast<const double*>(at);
    if (code == kFp32) return *static_cast<const float*>(at);
    const uint16_t bits = *static_cast<const uint16_t*>(at);
    return code == kFp16 ? float_of_fp16(bits) : float_of_bf16(bits);
  }
  // What the tensor holds, or the number in its place.
  __device__ __forceinline__ double or_number(double number) const { return at != nullptr ? read() : number; }
};

}  // namespace d2v
