// How a kernel is launched, finds its shared memory and stores 16 bytes, under nvcc and under the host shim: all they
// differ in.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

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

// Stores of 16 bytes, which nvcc splits where they are assignments and single elements may go to the same place.
template <int SIZE> __device__ __forceinline__ void store_bytes(void *to, const void *from) {
#if defined(__CUDACC__)
  uint4 words[SIZE / 16];
  memcpy(words, from, SIZE);
#pragma unroll
  for (int i = 0; i < SIZE / 16; ++i)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(static_cast<uint4 *>(to) + i), "r"(words[i].x),
                 "r"(words[i].y), "r"(words[i].z), "r"(words[i].w)
                 : "memory");
#else
  if (reinterpret_cast<uintptr_t>(to) % 16) dk_shim::fail("a store of 16 bytes to %p", to);
  std::memcpy(to, from, SIZE);
#endif
}

// The tf32 number next to x: 10 bits of mantissa, a float's exponents. From sm_80.
__device__ __forceinline__ float to_tf32(float x) {
#if !defined(__CUDACC__)
  return dk_shim::to_tf32(x);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  return x;
#endif
}

// D [16, 8] += A [16, 8] B [8, 8] of tf32 numbers, by a warp. Its lane 4 i + j has A at (i, j), (i + 8, j), (i, j + 4),
// (i + 8, j + 4), B at (j, i), (j + 4, i) and D at (i, 2 j), (i, 2 j + 1), (i + 8, 2 j), (i + 8, 2 j + 1). From sm_80.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if !defined(__CUDACC__)
  dk_shim::mma_tf32(d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
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
