// One row of a mask: block centres, priorities, exact counts, and the row's part of a MaskPlan.
//
// The definition is that of d2vkern/reference/masks.py, bit for bit. A cell is marked when the block around some
// centre, cut at the border of the grid, covers it. The row's chosen cells are the `target` smallest by (unmarked,
// priority, t): with `target` or more cells marked, marked cells compete for `target` places; with fewer, all of them
// are in and unmarked cells compete for the other places. The priority of the last place is found bit by bit, each a
// count over the row; where several cells have it, the smaller t goes first. Speech is a grid of one row with blocks
// of one row; text has no centres.
//
// `sample_row` is written for a team of threads: a block of a GPU, one thread of a CPU, or a test's threads.
#pragma once

#include "philox.cuh"

namespace d2v {

// What all counters of a row share.
struct RowStream {
  uint32_t c0, c1, c2, clone, k0, k1;
};

D2V_HOST_DEVICE RowStream row_stream(int64_t id, uint32_t m, int64_t seed, uint32_t epoch) {
  const uint64_t sample = static_cast<uint64_t>(id), key = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32), epoch, m << 18,
          static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// Draws 4 q .. 4 q + 3 of a row.
D2V_HOST_DEVICE Words draws(const RowStream& s, uint32_t purpose, uint32_t q) {
  return philox(s.c0, s.c1, s.c2, purpose << 30 | s.clone | q, s.k0, s.k1);
}

// Draw j of a row.
D2V_HOST_DEVICE uint32_t draw(const RowStream& s, uint32_t purpose, uint32_t j) {
  return draws(s, purpose, j / 4).w[j % 4];
}

// Settings of all rows of a call; height * width is the number of tokens.
struct MaskShape {
  int32_t height, width, centres, block_height, block_width, target;
  bool keep_chosen;  // the chosen cells are kept; otherwise they are masked
};

// Cells start .. end - 1 of one row of the grid.
struct Run {
  int32_t start, end;
};

// What row `down` of the block around `cell` covers; nothing where it lies outside the grid.
D2V_HOST_DEVICE Run block_run(int32_t cell, int32_t down, int32_t height, int32_t width, int32_t block_height,
                              int32_t block_width) {
  const int32_t y = cell / width - block_height / 2 + down, left = cell % width - block_width / 2;
  if (y < 0 || y >= height) return {0, 0};
  const int32_t right = left + block_width;
  return {y * width + (left > 0 ? left : 0), y * width + (right < width ? right : width)};
}

// One thread that does everything.
struct SoloTeam {
  D2V_HOST_DEVICE int32_t rank() const { return 0; }
  D2V_HOST_DEVICE int32_t size() const { return 1; }
  D2V_HOST_DEVICE void sync() {}
  D2V_HOST_DEVICE int32_t sum(int32_t value) { return value; }
  // The sum over smaller ranks; `total` receives that over all.
  D2V_HOST_DEVICE uint32_t sum_before(uint32_t value, uint32_t& total) {
    total = value;
    return 0;
  }
};

// Four values side by side; a GPU stores them at once, for which `slot` must be a multiple of 16 and `mask` of 4.
D2V_HOST_DEVICE void store_four(uint8_t* mask, int32_t* slot, const uint8_t (&m)[4], const int32_t (&s)[4]) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uchar4*>(mask) = make_uchar4(m[0], m[1], m[2], m[3]);
  *reinterpret_cast<int4*>(slot) = make_int4(s[0], s[1], s[2], s[3]);
#else
  memcpy(mask, m, sizeof m);
  memcpy(slot, s, sizeof s);
#endif
}

// Fills the row of a plan: mask [T] (1 where masked), slot [T] and ids_keep [K].
// priority [T], marked [T]: where these wait between the passes; the row's own slot and mask will do.
// sync, sum and sum_before of the team are called by all its members alike. Where T is a multiple of 4, slot must be
// one of 16 bytes, and mask of 4.
template <class Team, class Stream>
D2V_HOST_DEVICE void sample_row(Team& team, const MaskShape& shape, const Stream& stream, uint32_t* priority,
                                uint8_t* marked, uint8_t* mask, int32_t* slot, int32_t* ids_keep) {
  const int32_t tokens = shape.height * shape.width, groups = (tokens + 3) / 4;
  const int32_t rank = team.rank(), size = team.size();
  for (int32_t q = rank; q < groups; q += size) {
    const Words words = draws(stream, kPriorities, static_cast<uint32_t>(q));
    for (int32_t j = 0; j < 4; ++j) {
      if (4 * q + j < tokens) {
        priority[4 * q + j] = words.w[j];
        marked[4 * q + j] = 0;
      }
    }
  }
  team.sync();
  for (int32_t q = rank; 4 * q < shape.centres; q += size) {
    const Words words = draws(stream, kCentres, static_cast<uint32_t>(q));
    for (int32_t j = 0; j < 4; ++j) {
      if (4 * q + j >= shape.centres) continue;
      const int32_t cell = static_cast<int32_t>(below(words.w[j], static_cast<uint32_t>(tokens)));
      for (int32_t down = 0; down < shape.block_height; ++down) {
        const Run run = block_run(cell, down, shape.height, shape.width, shape.block_height, shape.block_width);
        for (int32_t t = run.start; t < run.end; ++t) marked[t] = 1;
      }
    }
  }
  team.sync();
  int32_t own = 0;
  for (int32_t t = rank; t < tokens; t += size) own += marked[t];
  const int32_t marks = team.sum(own);
  const bool surplus = marks >= shape.target;  // marked cells compete; else unmarked ones do
  const int32_t places = surplus ? shape.target : shape.target - marks;
  for (int32_t t = rank; t < tokens; t += size) {
    if ((marked[t] != 0) != surplus) priority[t] = 0xFFFFFFFFu;
  }

  uint32_t threshold = 0;  // in the end the priority of the last place
  int32_t smaller = 0;     // competitors below it
  for (int32_t bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = threshold | 1u << bit;
    own = 0;
    for (int32_t t = rank; t < tokens; t += size) own += priority[t] < candidate;
    // A bit is in the threshold when the places are not filled below it.
    const int32_t filled = team.sum(own);
    if (filled < places) {
      threshold = candidate;
      smaller = filled;
    }
  }
  team.sync();

  const uint32_t wanted = static_cast<uint32_t>(places - smaller);  // of the cells at the threshold
  uint32_t certain_before = 0, tied_before = 0;
  for (int32_t first = 0; first < groups; first += size) {
    const int32_t q = first + rank;
    uint32_t certain[4], tied[4], counts = 0;
    for (int32_t j = 0; j < 4; ++j) {
      const int32_t t = 4 * q + j;
      const bool inside = t < tokens, is_marked = inside && marked[t] != 0;
      const bool competes = inside && is_marked == surplus;
      certain[j] = (competes && priority[t] < threshold) || (is_marked && !surplus);
      tied[j] = competes && priority[t] == threshold;
      // Both counts in one sum: of one round they fit 16 bits.
      counts += certain[j] | tied[j] << 16;
    }
    uint32_t total;
    const uint32_t before = team.sum_before(counts, total);
    uint32_t certain_upto = certain_before + (before & 0xFFFFu), tied_upto = tied_before + (before >> 16);
    uint8_t masks[4];
    int32_t slots[4];
    for (int32_t j = 0; j < 4; ++j) {
      const int32_t t = 4 * q + j;
      const bool chosen = certain[j] != 0 || (tied[j] != 0 && tied_upto < wanted);
      const int32_t chosen_before =
          static_cast<int32_t>(certain_upto + (tied_upto < wanted ? tied_upto : wanted));
      certain_upto += certain[j];
      tied_upto += tied[j];
      const bool keep = chosen == shape.keep_chosen;
      const int32_t place = shape.keep_chosen ? chosen_before : t - chosen_before;
      masks[j] = keep ? 0 : 1;
      slots[j] = keep ? place : -1;
      if (keep && t < tokens) ids_keep[place] = t;
    }
    if (tokens % 4 == 0) {
      if (q < groups) store_four(mask + 4 * q, slot + 4 * q, masks, slots);
    } else {
      for (int32_t j = 0; j < 4; ++j) {
        if (4 * q + j < tokens) {
          mask[4 * q + j] = masks[j];
          slot[4 * q + j] = slots[j];
        }
      }
    }
    certain_before += total & 0xFFFFu;
    tied_before += total >> 16;
  }
}

}  // namespace d2v
