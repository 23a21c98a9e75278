// Philox 4x32-10 (Salmon et al., SC 2011) and the integers made of its words.
//
// Compiles as CUDA and as plain C++, so that a host compiler tests the maths the GPU runs. The counter layouts
// (which word holds what) and the contract for every conversion stand in d2vkern/reference/philox.py; the words
// and `below` are the same bits everywhere. Normals: normals.cuh.
#pragma once

#include "host_device.cuh"

namespace d2v {

// What a counter is drawn for: the upper two bits of its last word.
constexpr uint32_t kCentres = 0, kPriorities = 1, kNoise = 2, kDropout = 3;

struct Words {
  uint32_t w[4];
};

D2V_HOST_DEVICE uint32_t mul_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

// The four output words of a 128-bit counter (c0 the lowest word) under a 64-bit key.
D2V_HOST_DEVICE Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = mul_high(c0, kMultiplier0), low0 = c0 * kMultiplier0;
    const uint32_t high1 = mul_high(c2, kMultiplier1), low1 = c2 * kMultiplier1;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// An integer in [0, bound).
D2V_HOST_DEVICE uint32_t below(uint32_t word, uint32_t bound) { return mul_high(word, bound); }

}  // namespace d2v
