// Runs a kernel on the CPU, block by block, its threads as fibers that meet at barriers: see README.md.
//
// A thread runs until it waits; who runs next is drawn at random, so that a missing barrier shows as wrong numbers.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace dk_shim {

constexpr int WARP = 32;
constexpr int LAUNCH_FAILED = 719;  // cudaErrorLaunchFailure

struct Copy {  // one that cp.async has not brought yet
  void *to;
  const void *from;
  size_t size;
};

struct Thread {
  uint3 index;
  int linear;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

// What the code of a kernel sees.
extern Thread *current;
extern uint3 block_index;
extern dim3 block_size, grid_size;

void sync_threads();

// All lanes of the current warp meet; the last one runs action(slots) with what each of them brought.
void meet(void *slot, void (*action)(void **slots));

unsigned char *shared_memory();

// Ends the launch with an error; does not return.
[[noreturn]] void fail(const char *format, ...);

// Runs `body` once for each thread of each block: 0, or LAUNCH_FAILED (`last_error` has the words).
int run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()> &body);

const char *last_error();

}  // namespace dk_shim

extern "C" void dk_shim_seed(uint64_t seed);  // of the order in which threads run
