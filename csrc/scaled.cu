// A matrix scaled by rows or by columns: DoRA's transient c * W or dy * c for a library GEMM.

#include "device.cuh"

namespace dk {

template <class X>
__global__ void __launch_bounds__(THREADS, 1)
    scaled(Rows<X> x, Rows<float> factor, Rows<X> out, int64_t M, int64_t C, bool by_row) {
  const int64_t across = tiles(C, 8), i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int64_t m = i / across, column = i % across * 8;
  if (m >= M) return;
  Eight value = load_eight(x, m, column, C), by{};
  if (!by_row) by = load_eight(factor, m, column, C);
#pragma unroll
  for (int j = 0; j < 8; ++j) value.x[j] *= by_row ? factor.data[m] : by.x[j];
  store_eight(out, m, column, C, value);
}

}  // namespace dk

int dk_scaled(dk_matrix x, const float *factor, dk_matrix out, int64_t M, int64_t C, int32_t by_row, void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(out)) return DK_BAD_STRIDE;
  if (x.dtype != out.dtype) return DK_BAD_DTYPE;
  return by_dtype(x.dtype, [&](auto X) {
    using XT = decltype(X);
    return launch<Empty>(scaled<XT>, dim3(tiles(M * tiles(C, 8), THREADS)), stream, Rows<XT>(x), every_row(factor),
                         Rows<XT>(out), M, C, by_row);
  });
}
