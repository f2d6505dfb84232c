// What the kernels use of CUDA's runtime, for a C++ compiler: qualifiers, thread indices, barriers, shuffles.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (dk_shim::current->index)
#define blockIdx (dk_shim::block_index)
#define blockDim (dk_shim::block_size)
#define gridDim (dk_shim::grid_size)


using cudaStream_t = void *;
using cudaError_t = int;
inline const char *cudaGetErrorString(cudaError_t) { return dk_shim::last_error(); }

inline void __syncthreads() { dk_shim::sync_threads(); }
inline void __syncwarp() { dk_shim::meet(nullptr, [](void **) {}); }

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace dk_shim {

template <class T> struct Shuffle {
  T value, result;
  int from;
};

template <class T> T shuffle(T value, int from) {
  Shuffle<T> mine{value, value, from};
  meet(&mine, [](void **slots) {
    for (int lane = 0; lane < WARP; ++lane) {
      auto *one = static_cast<Shuffle<T> *>(slots[lane]);
      one->result = static_cast<Shuffle<T> *>(slots[one->from])->value;
    }
  });
  return mine.result;
}

}  // namespace dk_shim

template <class T> T __shfl_sync(unsigned, T value, int from) { return dk_shim::shuffle(value, from & 31); }
template <class T> T __shfl_xor_sync(unsigned, T value, int lanes) {
  return dk_shim::shuffle(value, static_cast<int>(threadIdx.x & 31) ^ lanes);
}
