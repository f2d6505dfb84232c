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

// To the nearest, ties away from 0, as cvt.rna.tf32.f32.
inline float to_tf32(float x) {
  if (!std::isfinite(x)) return x;
  return __int_as_float((__float_as_int(x) + 0x1000) & ~0x1fff);
}

struct Tf32Operands {
  float *d;
  const float *a, *b;
};

// mma.m16n8k8 with the elements where PTX's manual has them; as on a GPU, bits that tf32 lacks are not seen.
inline void mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  Tf32Operands mine{d, a, b};
  meet(&mine, [](void **slots) {
    float A[16][8], B[8][8];
    const auto seen = [](float x) { return __int_as_float(__float_as_int(x) & ~0x1fff); };
    for (int lane = 0; lane < WARP; ++lane) {
      const auto *one = static_cast<Tf32Operands *>(slots[lane]);
      const int i = lane / 4, j = lane % 4;
      for (int e = 0; e < 4; ++e) A[i + e % 2 * 8][j + e / 2 * 4] = seen(one->a[e]);
      for (int e = 0; e < 2; ++e) B[j + e * 4][i] = seen(one->b[e]);
    }
    for (int lane = 0; lane < WARP; ++lane) {
      float *sum = static_cast<Tf32Operands *>(slots[lane])->d;
      for (int e = 0; e < 4; ++e)
        for (int k = 0; k < 8; ++k) sum[e] += A[lane / 4 + e / 2 * 8][k] * B[k][lane % 4 * 2 + e % 2];
    }
  });
}

}  // namespace dk_shim

template <class T> T __shfl_sync(unsigned, T value, int from) { return dk_shim::shuffle(value, from & 31); }
template <class T> T __shfl_xor_sync(unsigned, T value, int lanes) {
  return dk_shim::shuffle(value, static_cast<int>(threadIdx.x & 31) ^ lanes);
}
