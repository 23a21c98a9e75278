// Grids of the kernels: how many blocks of how many threads, from the shapes alone. No CUDA in here, so that a host
// compiler tests it.
#pragma once

#include "host_device.cuh"

namespace d2v {

// Limits of every GPU since sm_30.
constexpr int64_t kMostBlocksX = 2147483647, kMostBlocksYZ = 65535;
constexpr int32_t kWarp = 32;

struct Grid {
  int64_t x = 0, y = 1, z = 1;
  int32_t threads = 1;
  int32_t shared = 0;  // bytes of dynamic shared memory

  // Nothing to do, nothing to launch.
  bool empty() const { return x == 0 || y == 0 || z == 0; }
  bool possible() const {
    return x >= 0 && y >= 0 && z >= 0 && x <= kMostBlocksX && y <= kMostBlocksYZ && z <= kMostBlocksYZ;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pointer tables: one block per chunk.
constexpr int32_t kTableThreads = 256;

inline Grid table_grid(int64_t programs) {
  Grid grid;
  grid.x = programs;
  grid.threads = kTableThreads;
  return grid;
}

// Masks: one block per row, a warp for up to 256 tokens. Priorities (4 bytes) and marks (1 byte) of up to kSharedTokens
// stay in shared memory, of longer rows in the row's own output; 40 KB is below what every GPU gives without asking.
constexpr int32_t kSharedTokens = 8192;
constexpr int32_t kMostMaskThreads = 512;

inline Grid masks_grid(int64_t rows, int32_t tokens) {
  Grid grid;
  grid.x = rows;
  grid.threads = kWarp;
  while (grid.threads < kMostMaskThreads && 8 * grid.threads < tokens) grid.threads *= 2;
  grid.shared = tokens <= kSharedTokens ? 5 * static_cast<int32_t>(4 * ceil_div(tokens, 4)) : 0;
  return grid;
}

// Rows of D columns: a warp for each of `length` places of `rows` rows, kRowWarps of them a block. Blocks of one row
// stand next to each other, then those of the next row: versions of a sample run together, and what they share is read
// from the L2 cache. Rows beyond 65535 go on in z; a block finds its row with `row_of`.
constexpr int32_t kRowWarps = 8;

inline Grid rows_grid(int64_t rows, int64_t length) {
  Grid grid;
  grid.x = ceil_div(length, kRowWarps);
  grid.y = rows < kMostBlocksYZ ? rows : kMostBlocksYZ;
  grid.z = ceil_div(rows, kMostBlocksYZ);
  grid.threads = kRowWarps * kWarp;
  return grid;
}

// The row of a block; the last z may reach beyond the rows.
D2V_HOST_DEVICE int64_t row_of(uint32_t block_y, uint32_t block_z, uint32_t blocks_y) {
  return static_cast<int64_t>(block_z) * blocks_y + block_y;
}

// Sums over samples: one per group of samples, at most kMostGroups.
constexpr int64_t kMostGroups = 256;
// Samples that a partial sum of dpositions covers, at least.
constexpr int64_t kSamplesPerSum = 4;

// What a gather's backward pass visits of the rows [extra tokens, tokens] of each group of samples.
struct BackwardRows {
  int64_t first;    // the first row that is wanted
  int64_t summed;   // rows from there that are summed over the samples
  int64_t visited;  // rows from there that have any gradient
  int64_t group;    // samples in a group
  int64_t groups;
};

inline BackwardRows backward_rows(int64_t samples, int64_t tokens, int64_t extras, bool need_x, bool need_extra,
                                  bool need_positions, bool need_per_mask) {
  BackwardRows rows;
  rows.first = need_extra ? 0 : extras;
  rows.summed = (need_positions ? extras + tokens : extras) - rows.first;
  rows.visited = (need_x || need_positions || need_per_mask ? extras + tokens : extras) - rows.first;
  rows.group = 1;
  if (rows.summed > 0) {
    const int64_t least = need_positions ? kSamplesPerSum : 1, share = ceil_div(samples, kMostGroups);
    rows.group = share > least ? share : least;
  }
  rows.groups = ceil_div(samples, rows.group);
  return rows;
}

// Column sums of a table: a thread for four neighbouring columns.
constexpr int32_t kSumThreads = 128;

inline Grid sums_grid(int64_t columns) {
  Grid grid;
  grid.x = ceil_div(ceil_div(columns, 4), kSumThreads);
  grid.threads = kSumThreads;
  return grid;
}

}  // namespace d2v
