// A block's product of two tiles on tensor cores where an operand is float32: in tf32, or in sums of tf32 numbers.
//
// A 16-bit float is one tf32 number. A float is one where tf32 is allowed (type tf32), else the sum of two, which hold 22
// of its 24 bits: two products stand for one with a 16-bit operand, three for one of floats, without that of the rests.
// The block's warps and sums are laid out as in product.cuh; a warp makes products of 16x8 by 8x8 (mma_tf32).

#pragma once

#include <type_traits>

#include "tiles.cuh"

namespace dk {

template <int WM, int NF> struct Tf32Product {
  static constexpr int COLUMNS = 2 * NF;  // products of 8 columns beside one another

  float sum[COLUMNS][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] = 0;
  }

  // A is a[m][k], or TRANSPOSED a[k][m]; B is b[k][n].
  template <bool TRANSPOSED, int BK, int LDA, int LDB, class TA, class TB>
  __device__ __forceinline__ void add(const TA *a, const TB *b) {
    const Place at;
    a += TRANSPOSED ? at.j * LDA + at.row + at.i : (at.row + at.i) * LDA + at.j;
    b += at.j * LDB + at.column + at.i;
    constexpr int DOWN = TRANSPOSED ? 1 : LDA, ACROSS = TRANSPOSED ? LDA : 1;
#pragma unroll 1
    for (int k = 0; k < BK; k += 8, a += 8 * ACROSS, b += 8 * LDB) {
      float left[TERMS<TA>][4], meets_rest[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        split(a[e % 2 * 8 * DOWN + e / 2 * 4 * ACROSS], left, e);
        meets_rest[e] = TERMS<TA> == 2 || finite(left[0][e]) ? left[0][e] : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < COLUMNS; ++n) {
        float right[TERMS<TB>][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) split(b[e * 4 * LDB + n * 8], right, e);
        if constexpr (TERMS<TA> == 2) mma_tf32(sum[n], left[1], right[0]);
        if constexpr (TERMS<TB> == 2) mma_tf32(sum[n], meets_rest, right[1]);
        mma_tf32(sum[n], left[0], right[0]);
      }
    }
  }

  template <int LD> __device__ __forceinline__ void store(float (*tile)[LD]) const {
    const Place at;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) tile[at.sum_row(e)][at.sum_column(n, e)] = sum[n][e];
  }

  template <int LD> __device__ __forceinline__ void load(const float (*tile)[LD]) {
    const Place at;
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] = tile[at.sum_row(e)][at.sum_column(n, e)];
  }

  template <class F, class... P> static __device__ __forceinline__ void zip(F f, P &...parts) {
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(parts.sum[n][e]...);
  }

private:
  // Of a warp's part of the block's product, and of a lane in it.
  struct Place {
    int row, column, i, j;

    __device__ __forceinline__ Place()
        : row(threadIdx.x / 32 % WM * 16), column(threadIdx.x / 32 / WM * 16 * NF), i(threadIdx.x % 32 / 4),
          j(threadIdx.x % 4) {}

    __device__ __forceinline__ int sum_row(int e) const { return row + i + e / 2 * 8; }
    __device__ __forceinline__ int sum_column(int n, int e) const { return column + n * 8 + j * 2 + e % 2; }
  };

  template <class T> static constexpr int TERMS = std::is_same<T, float>::value ? 2 : 1;

  static __device__ __forceinline__ bool finite(float x) { return fabsf(x) <= 3.4e38f; }

  // Writes the terms of a number to the same place in each of their arrays. Infinity is all rest: a rest meets no other
  // rest, and most of them are 0, which would make it NaN.
  template <int COUNT, int SIZE, class T>
  static __device__ __forceinline__ void split(T value, float (&terms)[COUNT][SIZE], int e) {
    const float x = wide(value);
    terms[0][e] = sizeof(T) == 2 ? x : COUNT == 1 || finite(x) ? to_tf32(x) : 0.0f;
    if constexpr (COUNT == 2) terms[1][e] = to_tf32(finite(x) ? x - terms[0][e] : x);
  }
};

}  // namespace dk
