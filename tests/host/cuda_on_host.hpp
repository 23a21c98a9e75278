// Runs a kernel's own source on a host: every block in turn, its threads as fibers that change at barriers.
//
// Include before the kernel's header. What CUDA defines and a kernel here uses is defined below; whoever adds a kernel
// that uses more finds out when this does not compile. A warp runs as far ahead of the others as barriers let it, in
// every other block the last warp and lane first, and shared memory begins as zeros; so a missing barrier shows as a
// wrong result, and threads that wait for different barriers as an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // each block has an operating system's thread to itself
#define __restrict__

struct Dimensions {
  uint32_t x = 1, y = 1, z = 1;
};

struct uint2 {
  uint32_t x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Loads and stores that stream.
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

static Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum class Wait { kNone, kWarp, kBlock };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::kNone;
  bool done = false;
};

constexpr uint32_t kLanes = 32;
constexpr size_t kStack = 64 << 10;

static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<uint32_t> exchanged;  // one value per thread, for shuffles and reductions
static std::vector<uint32_t> shared_memory;
static std::function<void()> thread_body;

static void enter() {
  thread_body();
  fibers[threadIdx.x].done = true;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

static void wait_for(Wait what) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.wait = what;
  swapcontext(&fiber.context, &scheduler);
}

// Lets threads go on that all wait for the same; whether there were any.
static bool release(Wait what, uint32_t begin, uint32_t end) {
  bool any = false;
  for (uint32_t i = begin; i < end; ++i) {
    if (fibers[i].done) continue;
    if (fibers[i].wait != what) return false;
    any = true;
  }
  for (uint32_t i = begin; i < end; ++i) fibers[i].wait = Wait::kNone;
  return any;
}

static void run_block(uint32_t threads) {
  fibers.resize(threads);
  exchanged.assign(threads, 0);
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.wait = Wait::kNone;
    fiber.done = false;
  }
  const uint32_t warps = (threads + kLanes - 1) / kLanes;
  const bool backwards = blockIdx.x % 2 == 0;
  for (;;) {
    for (uint32_t step = 0; step < warps; ++step) {
      const uint32_t begin = (backwards ? warps - 1 - step : step) * kLanes, end = std::min(threads, begin + kLanes);
      do {
        for (uint32_t lane = begin; lane < end; ++lane) {
          threadIdx.x = backwards ? begin + end - 1 - lane : lane;
          Fiber& fiber = fibers[threadIdx.x];
          if (!fiber.done && fiber.wait == Wait::kNone) swapcontext(&scheduler, &fiber.context);
        }
      } while (release(Wait::kWarp, begin, end));
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.done; })) return;
    if (!release(Wait::kBlock, 0, threads)) {
      throw std::runtime_error("threads of a block wait for different barriers");
    }
  }
}

// Runs `body` as every thread of every block. waits: the kernel has barriers; without, threads need no fibers.
template <class Grid>
void run(const Grid& grid, bool waits, const std::function<void()>& body) {
  if (!grid.possible()) throw std::runtime_error("the grid is larger than a GPU takes");
  blockDim = {static_cast<uint32_t>(grid.threads), 1, 1};
  gridDim = {static_cast<uint32_t>(grid.x), static_cast<uint32_t>(grid.y), static_cast<uint32_t>(grid.z)};
  thread_body = body;
  for (uint32_t z = 0; z < gridDim.z; ++z) {
    for (uint32_t y = 0; y < gridDim.y; ++y) {
      for (uint32_t x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        // What a block finds in its shared memory is anything.
        shared_memory.assign(static_cast<size_t>(grid.shared) / 4, 0xA5A5A5A5u);
        if (waits) {
          std::exception_ptr error;
          std::thread([&] {
            try {
              run_block(blockDim.x);
            } catch (...) {
              error = std::current_exception();
            }
          }).join();
          if (error) std::rethrow_exception(error);
        } else {
          for (uint32_t i = 0; i < blockDim.x; ++i) {
            threadIdx = {i, 0, 0};
            body();
          }
        }
      }
    }
  }
}

}  // namespace host

inline uint32_t* dynamic_shared() { return host::shared_memory.data(); }

inline void __syncthreads() { host::wait_for(host::Wait::kBlock); }

// Every lane's value, once all lanes of the warp have given theirs.
inline std::vector<uint32_t> all_lanes(uint32_t value) {
  host::exchanged[threadIdx.x] = value;
  host::wait_for(host::Wait::kWarp);
  const auto warp = host::exchanged.begin() + threadIdx.x / host::kLanes * host::kLanes;
  const std::vector<uint32_t> lanes(warp, warp + host::kLanes);
  host::wait_for(host::Wait::kWarp);
  return lanes;
}

inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  uint32_t sum = 0;
  for (const uint32_t lane : all_lanes(value)) sum += lane;
  return sum;
}

inline uint32_t __shfl_up_sync(uint32_t, uint32_t value, uint32_t delta) {
  const uint32_t lane = threadIdx.x % host::kLanes;
  return all_lanes(value)[lane >= delta ? lane - delta : lane];
}

inline uint32_t __shfl_sync(uint32_t, uint32_t value, uint32_t source) { return all_lanes(value)[source]; }
