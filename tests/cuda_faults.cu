// Kernels with known faults for tests/test_aot_cuda.py: the gate must catch each of its own.
#include <cstdint>

// Nothing wrong: 16 bytes at a time.
__global__ void sound_kernel(const float4* x, float4* out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const float4 value = x[i];
    out[i] = make_float4(2.0f * value.x, 2.0f * value.y, 2.0f * value.z, 2.0f * value.w);
  }
}

// The same, four bytes at a time.
__global__ void narrow_kernel(const float* x, float* out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = 2.0f * x[i];
}

// Wide outside the loop, narrow inside.
__global__ void narrow_loop_kernel(const float4* head, const float* x, float4* out, float* rest, int64_t count) {
  out[threadIdx.x] = head[threadIdx.x];
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) rest[i] = x[i];
}

// An array that is indexed by what nobody knows before: it lies in local memory.
__global__ void stack_kernel(const int32_t* at, float* out, int32_t count) {
  float values[256] = {};
  for (int32_t i = 0; i < count; ++i) values[at[i] & 255] += 1.0f;
  for (int32_t i = 0; i < count; ++i) out[i] = values[at[i] >> 8 & 255];
}

// More values alive than the 32 registers that 2048 threads leave each.
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* out, int32_t count) {
  float values[64];
#pragma unroll
  for (int32_t i = 0; i < 64; ++i) values[i] = x[64 * threadIdx.x + i];
  for (int32_t turn = 0; turn < count; ++turn) {
#pragma unroll
    for (int32_t i = 0; i < 64; ++i) values[i] = values[i] * values[(i + 1) % 64] + x[turn];
  }
#pragma unroll
  for (int32_t i = 0; i < 64; ++i) out[64 * threadIdx.x + i] = values[i];
}
