// A block's product of two tiles in shared memory, D [BM, BN] += A [BM, BK] B [BK, BN], summed in float32.
//
// TensorProduct and Tf32Product run on tensor cores, for two 16-bit operands of one type and where one is float32;
// PlainProduct takes any types, in float32. The block's four warps stand WM high and 4 / WM wide; each has 16 rows and
// 16 NF columns, or as many elements. `Meeting` chooses: a float32 operand beside bfloat16 becomes a sum of bfloat16
// planes, which loses nothing that float32 products keep; beside float16, whose range is too small for that, one of tf32
// numbers; two float32 operands are multiplied in float32, or in tf32 where that is allowed.

#pragma once

#include <mma.h>

#include "tf32_product.cuh"

namespace dk {

namespace wmma = nvcuda::wmma;

template <int WM, int NF> struct PlainProduct {
  static constexpr int BM = 16 * WM, BN = 16 * NF * (THREADS / 32 / WM);
  static constexpr int TM = 4, ROWS = BM / TM, COLUMNS = THREADS / ROWS, TN = BN / COLUMNS;

  float sum[TM][TN];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) sum[i][j] = 0;
  }

  // A is a[m][k], or TRANSPOSED a[k][m]; B is b[k][n].
  template <bool TRANSPOSED, int BK, int LDA, int LDB, class TA, class TB>
  __device__ __forceinline__ void add(const TA *a, const TB *b) {
    const int row = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
#pragma unroll 4
    for (int k = 0; k < BK; ++k) {
      float left[TM], right[TN];
#pragma unroll
      for (int i = 0; i < TM; ++i)
        left[i] = wide(TRANSPOSED ? a[k * LDA + row + i * ROWS] : a[(row + i * ROWS) * LDA + k]);
#pragma unroll
      for (int j = 0; j < TN; ++j) right[j] = wide(b[k * LDB + column + j * COLUMNS]);
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) sum[i][j] += left[i] * right[j];
    }
  }

  template <int LD> __device__ __forceinline__ void store(float (*tile)[LD]) const {
    const int row = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) tile[row + i * ROWS][column + j * COLUMNS] = sum[i][j];
  }

  // What stands where this thread's part of a product would be stored.
  template <int LD> __device__ __forceinline__ void load(const float (*tile)[LD]) {
    const int row = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) sum[i][j] = tile[row + i * ROWS][column + j * COLUMNS];
  }

  // Calls f with what stands at the same place in each of several, for every place of this thread.
  template <class F, class... P> static __device__ __forceinline__ void zip(F f, P &...parts) {
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) f(parts.sum[i][j]...);
  }
};

// For two operands of one 16-bit type.
template <class T, int WM, int NF> struct TensorProduct {
  using Sums = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

  Sums sum[NF];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < NF; ++j) wmma::fill_fragment(sum[j], 0.0f);
  }

  template <bool TRANSPOSED, int BK, int LDA, int LDB> __device__ __forceinline__ void add(const T *a, const T *b) {
    const int warp = threadIdx.x / 32, row = warp % WM * 16, column = warp / WM * 16 * NF;
#pragma unroll 1
    for (int k = 0; k < BK; k += 16) {
      if constexpr (TRANSPOSED) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::col_major> left;
        wmma::load_matrix_sync(left, a + k * LDA + row, LDA);
        multiply<LDB>(left, b + k * LDB + column);
      } else {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> left;
        wmma::load_matrix_sync(left, a + row * LDA + k, LDA);
        multiply<LDB>(left, b + k * LDB + column);
      }
    }
  }

  template <int LD> __device__ __forceinline__ void store(float (*tile)[LD]) const {
    const int warp = threadIdx.x / 32, row = warp % WM * 16, column = warp / WM * 16 * NF;
#pragma unroll
    for (int j = 0; j < NF; ++j)
      wmma::store_matrix_sync(&tile[row][column + 16 * j], sum[j], LD, wmma::mem_row_major);
  }

  template <int LD> __device__ __forceinline__ void load(const float (*tile)[LD]) {
    const int warp = threadIdx.x / 32, row = warp % WM * 16, column = warp / WM * 16 * NF;
#pragma unroll
    for (int j = 0; j < NF; ++j)
      wmma::load_matrix_sync(sum[j], &tile[row][column + 16 * j], LD, wmma::mem_row_major);
  }

  template <class F, class... P> static __device__ __forceinline__ void zip(F f, P &...parts) {
#pragma unroll
    for (int j = 0; j < NF; ++j)
#pragma unroll
      for (int i = 0; i < Sums::num_elements; ++i) f(parts.sum[j].x[i]...);
  }

private:
  template <int LDB, class Left> __device__ __forceinline__ void multiply(const Left &left, const T *b) {
#pragma unroll
    for (int j = 0; j < NF; ++j) {
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> right;
      wmma::load_matrix_sync(right, b + 16 * j, LDB);
      wmma::mma_sync(sum[j], left, right, sum[j]);
    }
  }
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // tensor cores without bfloat16 and tf32
template <int WM, int NF> struct TensorProduct<bf16, WM, NF> : PlainProduct<WM, NF> {};
template <int WM, int NF> using FloatProduct = PlainProduct<WM, NF>;
#else
template <int WM, int NF> using FloatProduct = Tf32Product<WM, NF>;
#endif

// How a token-sized operand of type X meets a small one of type S: S becomes PLANES planes of type Small.
template <class X, class S> struct Meeting {
  using Small = S;
  static constexpr int PLANES = 1;
  template <int WM, int NF> using Product = PlainProduct<WM, NF>;
};

template <class S> struct Meeting<tf32, S> {
  using Small = tf32;
  static constexpr int PLANES = 1;
  template <int WM, int NF> using Product = FloatProduct<WM, NF>;
};

template <> struct Meeting<half, float> {
  using Small = float;
  static constexpr int PLANES = 1;
  template <int WM, int NF> using Product = FloatProduct<WM, NF>;
};

template <> struct Meeting<half, half> {
  using Small = half;
  static constexpr int PLANES = 1;
  template <int WM, int NF> using Product = TensorProduct<half, WM, NF>;
};

template <> struct Meeting<bf16, bf16> {
  using Small = bf16;
  static constexpr int PLANES = 1;
  template <int WM, int NF> using Product = TensorProduct<bf16, WM, NF>;
};

template <> struct Meeting<bf16, float> {
  using Small = bf16;
  static constexpr int PLANES = 3;  // hold all of float32's 24 bits
  template <int WM, int NF> using Product = TensorProduct<bf16, WM, NF>;
};

}  // namespace dk
