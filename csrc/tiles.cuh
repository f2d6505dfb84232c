// How tiles of matrices come to shared memory: token-sized ones by asynchronous copies, small ones through registers.

#pragma once

#include "device.cuh"

namespace dk {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool ASYNC = false;  // copies to shared memory wait for what they read
#else
constexpr bool ASYNC = true;
#endif

// Elements that end a row of a tile in shared memory, so that rows start in different banks.
template <class T> constexpr int PAD = 16 / sizeof(T);

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

}  // namespace dk
