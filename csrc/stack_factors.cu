// A mixture's factors side by side, [A; G; A0] and [B | -gamma B0], cast on the way: a thread for each element of both.

#include "device.cuh"

namespace dk {

__global__ void __launch_bounds__(THREADS, 1)
    stack_factors(dk_matrix A, dk_matrix router, dk_matrix frozen_A, dk_matrix B, dk_matrix frozen_B,
                  const float *residual, dk_matrix rows, dk_matrix columns, int64_t K, int64_t N, int64_t of_A,
                  int64_t of_router, int64_t of_start, int64_t E, int64_t r, int64_t starts, int64_t r0) {
  const int64_t row_blocks = tiles((of_A + of_router + of_start) * K, THREADS);
  if (blockIdx.x < row_blocks) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, row = i / K, k = i % K;
    if (row >= of_A + of_router + of_start) return;
    const int64_t of_both = of_A + of_router;
    store(rows, row, k, row < of_A      ? load(A, row, k)
                        : row < of_both ? load(router, row - of_A, k)
                                        : load(frozen_A, row - of_both, k));
    return;
  }
  const int64_t i = (blockIdx.x - row_blocks) * THREADS + threadIdx.x, R = E * r, width = R + starts * r0;
  const int64_t n = i / width, c = i % width, q = c - R;
  if (n >= N) return;
  store(columns, n, c, c < R ? load(B, c / r * N + n, c % r)
                             : -residual[q / r0] * load(frozen_B, q / r0 * N + n, q % r0));
}

}  // namespace dk

int dk_stack_factors(dk_matrix A, dk_matrix router, dk_matrix frozen_A, dk_matrix B, dk_matrix frozen_B,
                     const float *residual, dk_matrix rows, dk_matrix columns, int64_t K, int64_t N, int64_t of_A,
                     int64_t of_router, int64_t of_start, int64_t E, int64_t r, int64_t starts, int64_t r0,
                     void *stream) {
  using namespace dk;
  const auto wrong = [](const dk_matrix &m) { return m.data && !known(m.dtype); };
  if (wrong(A) || wrong(router) || wrong(frozen_A) || wrong(B) || wrong(frozen_B) || wrong(rows) || wrong(columns))
    return DK_BAD_DTYPE;
  if ((of_A && !A.data) || (of_router && !router.data) || (of_start && !frozen_A.data) ||
      (starts && !(frozen_B.data && residual)))
    return DK_MISSING;
  const int64_t blocks = tiles((of_A + of_router + of_start) * K, THREADS) + tiles(N * (E * r + starts * r0), THREADS);
  return launch<Empty>(stack_factors, dim3(blocks), stream, A, router, frozen_A, B, frozen_B, residual, rows, columns,
                       K, N, of_A, of_router, of_start, E, r, starts, r0);
}
