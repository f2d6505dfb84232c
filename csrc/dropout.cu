// Dropout masks as tensors, and inputs with them applied, for what runs on a library GEMM (PEFT's two-term DoRA).

#include "device.cuh"

namespace dk {

// A thread has four neighbours of a row: one hash.
__global__ void __launch_bounds__(THREADS, 1)
    dropout_mask(const int64_t *seed, int threshold, uint8_t *kept, int64_t T, int64_t K) {
  const Mask mask(seed, threshold, K);
  const int64_t across = tiles(K, 4), i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t t = i / across, group = i % across;
  if (t >= T) return;
  const unsigned keeps = mask.keeps(t, group);
  for (int j = 0; j < 4 && group * 4 + j < K; ++j) kept[t * K + group * 4 + j] = keeps >> j & 1;
}

template <class X>
__global__ void __launch_bounds__(THREADS, 1)
    drop(Rows<X> x, const int64_t *seed, int threshold, float factor, Rows<X> dropped, Rows<X> rest, int64_t T,
         int64_t K) {
  const Mask mask(seed, threshold, K);
  const int64_t across = tiles(K, 8), i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t t = i / across, column = i % across * 8;
  if (t >= T) return;
  Eight value = load_eight(x, t, column, K), left = value;
  if (mask.drops) mask.drop(value, t, column);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    value.x[j] *= factor;
    left.x[j] -= value.x[j];
  }
  store_eight(dropped, t, column, K, value);
  store_eight(rest, t, column, K, left);
}

}  // namespace dk

int dk_dropout_mask(const int64_t *seed, int32_t threshold, uint8_t *mask, int64_t T, int64_t K, void *stream) {
  using namespace dk;
  if (!seed) return DK_MISSING;
  return launch<Empty>(dropout_mask, dim3(tiles(T * tiles(K, 4), THREADS)), stream, seed, threshold, mask, T, K);
}

int dk_drop(dk_matrix x, const int64_t *seed, int32_t threshold, float factor, dk_matrix dropped, dk_matrix rest,
            int64_t T, int64_t K, void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(dropped) || !is_rows(rest)) return DK_BAD_STRIDE;
  if (x.dtype != dropped.dtype || x.dtype != rest.dtype) return DK_BAD_DTYPE;
  return by_dtype(x.dtype, [&](auto X) {
    using XT = decltype(X);
    return launch<Empty>(drop<XT>, dim3(tiles(T * tiles(K, 8), THREADS)), stream, Rows<XT>(x), seed, threshold, factor,
                         Rows<XT>(dropped), Rows<XT>(rest), T, K);
  });
}
