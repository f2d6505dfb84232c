// Sums over the rows of tiles in shared memory, of x and of x * y, y read straight from memory: sum_t x, sum_t x * y.
//
// A thread adds up what it has itself brought of a tile (start_tile), in 16-byte accesses: no barrier stands before
// that, and drop_tile may follow. The lanes of a warp then share out the columns they have in common, two for each.

#pragma once

#include "product.cuh"

namespace dk {

template <class X, int ROWS, int COLUMNS> struct ColumnSums {
  static constexpr int SIZE = 16 / sizeof(X), CHUNKS = COLUMNS / SIZE, STEP = THREADS / CHUNKS, COUNT = ROWS / STEP;
  static_assert(32 / CHUNKS == SIZE / 2 && ROWS % STEP == 0, "two columns for each lane of a warp");

  struct alignas(16) Chunk {
    X x[SIZE];
  };

  Chunk y[COUNT];  // on its way

  // Starts to read this thread's part of y's tile; outside: 0.
  __device__ __forceinline__ void load(const Rows<X> &m, int64_t row, int64_t column, int64_t rows, int64_t columns) {
    const int c = threadIdx.x % CHUNKS * SIZE, first = threadIdx.x / CHUNKS;
    const int r_left = left(rows, row, ROWS) - first, c_left = left(columns, column, COLUMNS) - c;
    const X *from = m.data + (row + first) * m.stride + column + c;
#pragma unroll
    for (int i = 0; i < COUNT; ++i, from += STEP * m.stride) {
      if (m.aligned && c_left >= SIZE && i * STEP < r_left) {
        y[i] = *reinterpret_cast<const Chunk *>(from);
      } else {
#pragma unroll
        for (int j = 0; j < SIZE; ++j) y[i].x[j] = i * STEP < r_left && j < c_left ? from[j] : narrow<X>(0.0f);
      }
    }
  }

  // Adds the two columns of this lane over the rows of its warp, to `sum` and, with y, to `dot`.
  template <int LD>
  __device__ __forceinline__ void add(const X (*tile)[LD], bool dots, float (&sum)[2], float (&dot)[2]) const {
    const int c = threadIdx.x % CHUNKS * SIZE, first = threadIdx.x / CHUNKS;
    float sums[SIZE] = {}, products[SIZE] = {};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Chunk x = *reinterpret_cast<const Chunk *>(&tile[first + i * STEP][c]);
#pragma unroll
      for (int j = 0; j < SIZE; ++j) {
        sums[j] += wide(x.x[j]);
        if (dots) products[j] += wide(x.x[j]) * wide(y[i].x[j]);
      }
    }
    share(sums, sum);
    if (dots) share(products, dot);
  }

  // Puts this lane's two columns of a tile that begins at `first` where `total` adds up what the warps found.
  template <int ALL> static __device__ __forceinline__ void put(float (*warps)[ALL], int first, const float (&sum)[2]) {
    int c = first + threadIdx.x % CHUNKS * SIZE;
#pragma unroll
    for (int lanes = 16, width = SIZE / 2; lanes >= CHUNKS; lanes /= 2, width /= 2)
      c += threadIdx.x & lanes ? width : 0;
    warps[threadIdx.x / 32][c] = sum[0];
    warps[threadIdx.x / 32][c + 1] = sum[1];
  }

  template <int ALL> static __device__ __forceinline__ float total(const float (*warps)[ALL], int c) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) sum += warps[w][c];
    return sum;
  }

private:
  // Lanes with the same columns halve them until two are left for each.
  static __device__ __forceinline__ void share(float (&value)[SIZE], float (&to)[2]) {
#pragma unroll
    for (int lanes = 16, width = SIZE / 2; lanes >= CHUNKS; lanes /= 2, width /= 2) {
      const bool upper = threadIdx.x & lanes;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float given = upper ? value[j] : value[j + width];
        value[j] = (upper ? value[j + width] : value[j]) + __shfl_xor_sync(~0u, given, lanes);
      }
    }
    to[0] += value[0];
    to[1] += value[1];
  }
};

}  // namespace dk
