// A block's product of two tiles in shared memory, D [BM, BN] += A [BM, BK] B [BK, BN], summed in float32.
//
// TensorProduct runs on tensor cores, for two 16-bit operands of one type; PlainProduct takes any types, in float32.
// The block's four warps stand WM high and 4 / WM wide; each has 16 rows and 16 NF columns, or as many elements.
// `Meeting` chooses: a float32 operand beside bfloat16 becomes a sum of bfloat16 planes, which loses nothing that
// float32 products keep; beside float16, whose range is too small for that, the product is in float32.

#pragma once

#include <mma.h>

#include "device.cuh"

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

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // no asynchronous copies, tensor cores without bfloat16
constexpr bool ASYNC = false;
template <int WM, int NF> struct TensorProduct<bf16, WM, NF> : PlainProduct<WM, NF> {};
#else
constexpr bool ASYNC = true;
#endif

// How a token-sized operand of type X meets a small one of type S: S becomes PLANES planes of type Small.
template <class X, class S> struct Meeting {
  using Small = S;
  static constexpr int PLANES = 1;
  template <int WM, int NF> using Product = PlainProduct<WM, NF>;
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

// What is left of a float when a plane has taken its part; nothing where that is infinite or NaN.
template <class Small> __device__ __forceinline__ float rest(float value, Small plane) {
  return fabsf(wide(plane)) <= 3.4e38f ? value - wide(plane) : 0.0f;
}

// Writes a value to the same place in each plane: the sum of what stands there is the value.
template <int PLANES, int SIZE, class Small> __device__ __forceinline__ void put(Small *at, float value) {
#pragma unroll
  for (int p = 0; p < PLANES; ++p) {
    at[p * SIZE] = narrow<Small>(value);
    if (p + 1 < PLANES) value = rest(value, at[p * SIZE]);
  }
}

// How many of `size` elements from `first` on a tile of `most` has.
__device__ __forceinline__ int left(int64_t size, int64_t first, int most) {
  return size - first < most ? static_cast<int>(size - first) : most;
}

// A tile of a small matrix on its way to shared memory, in registers: loaded early, put down when its place is free.
// Neighbours in memory go to neighbouring threads; each takes every so many-th row, or column, from its first on.
template <class S, int ROWS, int COLUMNS> struct SmallTile {
  static constexpr int COUNT = ROWS * COLUMNS / THREADS;
  static_assert(THREADS % ROWS == 0 && THREADS % COLUMNS == 0 && COUNT > 0, "a tile that threads can share");

  S value[COUNT];

  __device__ __forceinline__ void load(const Strided<S> &m, int64_t row, int64_t column, int64_t rows,
                                       int64_t columns) {
    const Place at(m.row == 1);
    const S *from = m.data + (row + at.r) * m.row + (column + at.c) * m.column;
    const int64_t step = at.down ? m.column * at.dc : m.row * at.dr;
    const int r_left = left(rows, row, ROWS) - at.r, c_left = left(columns, column, COLUMNS) - at.c;
#pragma unroll
    for (int i = 0; i < COUNT; ++i, from += step)
      value[i] = i * at.dr < r_left && i * at.dc < c_left ? *from : narrow<S>(0.0f);
  }

  // `by`, if it is there, multiplies the tile's rows, of which the matrix has `rows`.
  template <int PLANES, int LD, class Small>
  __device__ __forceinline__ void store(const Strided<S> &m, Small (*planes)[ROWS][LD], const float *by = nullptr,
                                        int rows = 0) const {
    const Place at(m.row == 1);
    Small *to = &planes[0][at.r][at.c];
    const int step = at.dr * LD + at.dc;
#pragma unroll
    for (int i = 0; i < COUNT; ++i, to += step) {
      const float factor = by && at.r + i * at.dr < rows ? by[at.r + i * at.dr] : 1.0f;
      put<PLANES, ROWS * LD>(to, wide(value[i]) * factor);
    }
  }

private:
  struct Place {
    bool down;
    int r, c, dr, dc;
    __device__ __forceinline__ explicit Place(bool down_)
        : down(down_), r(down ? threadIdx.x % ROWS : threadIdx.x / COLUMNS),
          c(down ? threadIdx.x / ROWS : threadIdx.x % COLUMNS), dr(down ? 0 : THREADS / COLUMNS),
          dc(down ? THREADS / ROWS : 0) {}
  };
};

// A tile [ROWS, COLUMNS] of a token-sized matrix on its way to shared memory, asynchronously from sm_80; outside: 0. A
// tile that is outside altogether is left alone. Each thread brings 16 bytes of every so many-th row.
template <int ROWS, int COLUMNS, int LD, class T>
__device__ __forceinline__ void start_tile(T (*tile)[LD], const Rows<T> &m, int64_t row, int64_t column, int64_t rows,
                                           int64_t columns) {
  constexpr int SIZE = 16 / sizeof(T), CHUNKS = COLUMNS / SIZE, STEP = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "a tile that threads can share");
  if (row < rows && column < columns) {
    const int c = threadIdx.x % CHUNKS * SIZE, first = threadIdx.x / CHUNKS;
    const int r_left = left(rows, row, ROWS), c_left = left(columns, column, COLUMNS);
    const T *from = m.data + (row + first) * m.stride + column + c;
    if (m.aligned && r_left == ROWS && c_left == COLUMNS) {
#pragma unroll
      for (int r = first; r < first + ROWS; r += STEP, from += STEP * m.stride)
        __pipeline_memcpy_async(&tile[r][c], from, 16);
    } else {
#pragma unroll 1
      for (int r = first; r < first + ROWS; r += STEP, from += STEP * m.stride) {
        if (m.aligned && r < r_left && c + SIZE <= c_left) {
          __pipeline_memcpy_async(&tile[r][c], from, 16);
        } else {
#pragma unroll
          for (int j = 0; j < SIZE; ++j) tile[r][c + j] = r < r_left && c + j < c_left ? from[j] : narrow<T>(0.0f);
        }
      }
    }
  }
  __pipeline_commit();
}

// Drops elements of the part of a tile that this thread has brought, when it has come.
template <int ROWS, int COLUMNS, int LD, class T>
__device__ __forceinline__ void drop_tile(T (*tile)[LD], const Mask &mask, int64_t row, int64_t column) {
  constexpr int SIZE = 16 / sizeof(T), CHUNKS = COLUMNS / SIZE, STEP = THREADS / CHUNKS;
  const int c = threadIdx.x % CHUNKS * SIZE, first = threadIdx.x / CHUNKS;
#pragma unroll 1
  for (int r = first; r < first + ROWS; r += STEP) {
#pragma unroll
    for (int g = 0; g < SIZE; g += 4) {
      unsigned kept = mask.keeps(row + r, (column + c + g) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        tile[r][c + g + j] = narrow<T>(wide(tile[r][c + g + j]) * static_cast<float>(kept >> j & 1));
    }
  }
}

// Elements that end a row of a tile in shared memory, so that rows start in different banks.
template <class T> constexpr int PAD = 16 / sizeof(T);

}  // namespace dk
