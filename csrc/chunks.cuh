// Which part of which tensors a program works on, read from the pointer table of kernels/_chunks.py.
//
//     words    [programs]            index of the row's record in the table << 32 | chunk's number in the row
//     records  [rows, 3 + columns]   elements, kind, aligned, then the addresses (0: there is no such tensor)
//
// A kind is an index into the launch's list of kinds; each kind holds one dtype code per column, two bits each.
#pragma once

#include "vectors.cuh"

namespace d2v {

constexpr int32_t kHeader = 3;
constexpr int32_t kMostKinds = 128;

struct Chunk {
  const int64_t* record;
  int64_t first;     // element of the tensors where the chunk begins
  int32_t in_fours;  // elements, from `first` on, that go four at a time: all or none but the last few
  int32_t count;     // elements
  int32_t kind;
};

D2V_HOST_DEVICE Chunk find_chunk(const int64_t* table, int64_t program, int32_t chunk) {
  const int64_t word = table[program];
  Chunk found;
  found.record = table + (word >> 32);
  found.first = (word & 0xFFFFFFFF) * chunk;
  const int64_t rest = found.record[0] - found.first;
  found.count = rest < chunk ? static_cast<int32_t>(rest) : chunk;
  found.in_fours = found.record[2] != 0 ? found.count / 4 * 4 : 0;
  found.kind = static_cast<int32_t>(found.record[1]);
  return found;
}

// The row's tensor in a column; 0: there is none.
D2V_HOST_DEVICE uint64_t address_of(const Chunk& chunk, int32_t column) {
  return static_cast<uint64_t>(chunk.record[kHeader + column]);
}

// All kinds of a launch, by value.
struct Kinds {
  uint16_t packed[kMostKinds];
};

D2V_HOST_DEVICE int32_t code_of(uint32_t packed, int32_t column) { return packed >> (2 * column) & 3u; }

}  // namespace d2v
