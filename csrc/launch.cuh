// How a kernel is launched and finds its shared memory, under nvcc and under the host shim: all they differ in.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "delora_kernels.h"

namespace dk {

// Of every block. Kernels say __launch_bounds__(THREADS, 1), as many registers as they like, so that nothing spills; or
// (THREADS, 4), as few as let four blocks run at a time, where nothing spills even so.
constexpr int THREADS = 128;

// The block's shared memory: each kernel lays it out as one struct.
template <class Layout> __device__ __forceinline__ Layout &shared_memory() {
#if defined(__CUDACC__)
  __shared__ Layout memory;
  return memory;
#else
  return *reinterpret_cast<Layout *>(dk_shim::shared_memory());
#endif
}

struct Empty {};

template <class T> struct Same {
  using type = T;
};

// Runs `kernel` on a grid of blocks, each with a Layout of shared memory; nothing where the grid is empty.
template <class Layout, class... P>
int launch(void (*kernel)(P...), dim3 grid, void *stream, typename Same<P>::type... arguments) {
  static_assert(sizeof(Layout) <= 48 << 10, "a block has no more without asking for it");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return DK_OK;
#if defined(__CUDACC__)
  kernel<<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
#else
  (void)stream;
  return dk_shim::run(grid, THREADS, sizeof(Layout), [&] { kernel(arguments...); });
#endif
}

// How many tiles cover `size`.
__host__ __device__ inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace dk
