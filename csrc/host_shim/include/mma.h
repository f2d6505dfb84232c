// nvcuda::wmma for 16x16x16 tiles: every lane holds 8 of a fragment's 256 elements, as on a GPU the caller can't say
// which; the product is made when all lanes of the warp have come. Pointers and strides must be as aligned as there.

#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "the shim knows 16x16x16");
  static constexpr int num_elements = 8;
  T x[num_elements];
};

inline float element(__half x) { return __half2float(x); }
inline float element(__nv_bfloat16 x) { return __bfloat162float(x); }

inline void check(const void *memory, unsigned stride, size_t size) {
  if (reinterpret_cast<uintptr_t>(memory) % 32 || stride * size % 16)
    dk_shim::fail("a wmma tile at %p with a stride of %zu bytes: 32 and 16 must divide them", memory, stride * size);
}

template <class Layout> size_t offset(int i, unsigned stride);
template <> inline size_t offset<row_major>(int i, unsigned stride) { return size_t(i / 16) * stride + i % 16; }
template <> inline size_t offset<col_major>(int i, unsigned stride) { return size_t(i % 16) * stride + i / 16; }

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &to, const T *from, unsigned stride) {
  check(from, stride, sizeof(T));
  int first = (threadIdx.x & 31) * 8;
  for (int j = 0; j < 8; ++j) to.x[j] = from[offset<Layout>(first + j, stride)];
}

inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float> &to, const float *from, unsigned stride,
                             layout_t layout) {
  check(from, stride, sizeof(float));
  if (layout != mem_row_major) dk_shim::fail("the shim loads sums row by row");
  int first = (threadIdx.x & 31) * 8;
  for (int j = 0; j < 8; ++j) to.x[j] = from[offset<row_major>(first + j, stride)];
}

inline void store_matrix_sync(float *to, const fragment<accumulator, 16, 16, 16, float> &from, unsigned stride,
                              layout_t layout) {
  check(to, stride, sizeof(float));
  if (layout != mem_row_major) dk_shim::fail("the shim stores row by row");
  int first = (threadIdx.x & 31) * 8;
  for (int j = 0; j < 8; ++j) to[offset<row_major>(first + j, stride)] = from.x[j];
}

template <class F> void fill_fragment(F &fragment, float value) {
  for (float &x : fragment.x) x = value;
}

template <class T> struct Product {
  float *d;
  const T *a, *b;
};

template <class T, class LA, class LB>
void mma_sync(fragment<accumulator, 16, 16, 16, float> &d, const fragment<matrix_a, 16, 16, 16, T, LA> &a,
              const fragment<matrix_b, 16, 16, 16, T, LB> &b, const fragment<accumulator, 16, 16, 16, float> &c) {
  if (&c != &d) d = c;
  Product<T> mine{d.x, a.x, b.x};
  dk_shim::meet(&mine, [](void **slots) {
    float A[16][16], B[16][16];
    for (int i = 0; i < 256; ++i) {
      auto *lane = static_cast<Product<T> *>(slots[i / 8]);
      A[i / 16][i % 16] = element(lane->a[i % 8]);
      B[i / 16][i % 16] = element(lane->b[i % 8]);
    }
    for (int row = 0; row < 16; ++row) {
      float sum[16];
      float *halves[] = {static_cast<Product<T> *>(slots[2 * row])->d, static_cast<Product<T> *>(slots[2 * row + 1])->d};
      std::memcpy(sum, halves[0], 32);
      std::memcpy(sum + 8, halves[1], 32);
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 16; ++column) sum[column] += A[row][k] * B[k][column];
      std::memcpy(halves[0], sum, 32);
      std::memcpy(halves[1], sum + 8, 32);
    }
  });
}

}  // namespace wmma
}  // namespace nvcuda
