// csrc/philox.cuh and normals.cuh behind a C interface over arrays, for test_philox_host.py.
#include "normals.cuh"

#include <cstddef>

extern "C" {

// counter: [count, 4], key: [count, 2], out: [count, 4].
void philox_words(const uint32_t* counter, const uint32_t* key, uint32_t* out, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const uint32_t *c = counter + 4 * i, *k = key + 2 * i;
    const d2v::Words words = d2v::philox(c[0], c[1], c[2], c[3], k[0], k[1]);
    for (int j = 0; j < 4; ++j) out[4 * i + j] = words.w[j];
  }
}

void philox_below(const uint32_t* words, uint32_t bound, uint32_t* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = d2v::below(words[i], bound);
}

void philox_uniform(const uint32_t* words, float* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = d2v::uniform(words[i]);
}

// words: [count, 4], out: [count, 4].
void philox_normal(const uint32_t* words, float* out, size_t count) {
  for (size_t i = 0; i < 2 * count; ++i) {
    const d2v::Normals pair = d2v::normal_pair(words[2 * i], words[2 * i + 1]);
    out[2 * i] = pair.first;
    out[2 * i + 1] = pair.second;
  }
}
}
