// Partial sums added in their order, so that results repeat bit for bit: what follows a split reduction.

#include "groups.cuh"

namespace dk {

__global__ void __launch_bounds__(THREADS, 1)
    add_parts(const float *in, int64_t parts, int64_t size, void *out, int dtype) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i < size) store(out, dtype, i, total(in, i, parts, size));
}

constexpr int WARPS = THREADS / 32;

// A warp has one row n of dB, dm and dy_sum; in the blocks after the last row a thread has one element of dv.
__global__ void __launch_bounds__(THREADS, 1)
    finish_dy(const float *dv_in, int64_t dv_parts, int64_t dv_size, void *dv, int dv_dtype, const float *product,
              const float *sums, const float *dots, int64_t parts, dk_matrix B_hat, const float *c, dk_vector divisor,
              float *dB, float *dm, float *dy_sum, int64_t N, int64_t R) {
  const int64_t after = blockIdx.x - tiles(N, WARPS);
  if (after >= 0) {
    const int64_t i = after * THREADS + threadIdx.x;
    if (i < dv_size) store(dv, dv_dtype, i, total(dv_in, i, dv_parts, dv_size));
    return;
  }
  const int64_t n = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (n >= N) return;
  float dot = 0;
  if (product)
    for (int64_t r = lane; r < R; r += 32) {
      const float value = total(product, n * R + r, parts, N * R);
      if (B_hat.data) dot += value * load(B_hat, n, r);  // what was kept is x W^T: the rest of u is in dB
      dB[n * R + r] = c ? value * c[n] : value;
    }
  if (sums && lane == 0) dy_sum[n] = total(sums, n, parts, N);
  if (dots) {
    dot = warp_sum(dot);
    const float by = load(divisor, n);
    if (lane == 0) dm[n] = by == 0 ? 0 : (total(dots, n, parts, N) + dot) / by;
  }
}

// A thread has one element of the sums of one expert, of which there are parts where it has many rows.
__global__ void __launch_bounds__(THREADS, 1)
    grouped_total(Groups groups, const float *parts, float *product, float *sums, int64_t C, int64_t R, int64_t part) {
  const int64_t expert = blockIdx.y, of_product = product ? R * C : 0, size = of_product + (sums ? C : 0);
  const Tile several = groups.several(expert, part);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (several.end == 0 || i >= size) return;
  float *to = i < of_product ? product + expert * R * C + i : sums + expert * C + (i - of_product);
  *to = total(parts + several.place * size, i, several.end, size);
}

}  // namespace dk

int dk_add_parts(const float *in, int64_t parts, int64_t size, void *out, int32_t dtype, void *stream) {
  using namespace dk;
  if (!known(dtype)) return DK_BAD_DTYPE;
  return launch<Empty>(add_parts, dim3(tiles(size, THREADS)), stream, in, parts, size, out, dtype);
}

int dk_finish_dy(const float *dv_in, int64_t dv_parts, int64_t dv_size, void *dv, int32_t dv_dtype,
                 const float *product, const float *sums, const float *dots, int64_t parts, dk_matrix B_hat,
                 const float *c, dk_vector divisor, float *dB, float *dm, float *dy_sum, int64_t N, int64_t R,
                 void *stream) {
  using namespace dk;
  if ((B_hat.data && !known(B_hat.dtype)) || (dots && !known(divisor.dtype)) || (dv_in && !known(dv_dtype)))
    return DK_BAD_DTYPE;
  if ((product && !dB) || (sums && !dy_sum) || (dots && !(dm && divisor.data)) || (dv_in && !dv)) return DK_MISSING;
  const int64_t elements = dv_in ? dv_size : 0;
  return launch<Empty>(finish_dy, dim3(tiles(N, WARPS) + tiles(elements, THREADS)), stream, dv_in, dv_parts, elements,
                       dv, dv_dtype, product, sums, dots, parts, B_hat, c, divisor, dB, dm, dy_sum, N, R);
}

int dk_grouped_total(const void *offsets, int32_t in_64_bits, const float *parts, float *product, float *sums,
                     int64_t T, int64_t C, int64_t R, int64_t E, int64_t part, void *stream) {
  using namespace dk;
  if (part < 1 || E > 65535) return DK_BAD_SIZE;
  const int64_t size = (product ? R * C : 0) + (sums ? C : 0);
  return launch<Empty>(grouped_total, dim3(tiles(size, THREADS), E), stream, Groups{offsets, in_64_bits != 0, E, T},
                       parts, product, sums, C, R, part);
}
