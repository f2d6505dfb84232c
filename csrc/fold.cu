// The fold of a pair of factors and its inverse for gradients, O(R (K + N)): a block for each row of A, column of B.
//
// A block reads its vector twice, first for the norm (or the product with its gradient), then to write it scaled; a
// thread has eight elements on their way at a time.

#include "device.cuh"

namespace dk {

struct Scratch {
  float sums[THREADS / 32];
};

// The sum over a block, in every thread, in a fixed order. Once a kernel: the scratch is not written again.
__device__ __forceinline__ float block_sum(float x) {
  float *warps = shared_memory<Scratch>().sums;
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) x += warps[w];
  return x;
}

// 1 / max(norm, eps); without a clamp 0 for a norm of 0: a vector of length 0 has no direction.
__device__ __forceinline__ float inverse_of(float norm, float eps) {
  if (eps > 0) return 1 / fmaxf(norm, eps);
  return norm == 0 ? 0 : 1 / norm;
}

// One row or column of a matrix.
__device__ __forceinline__ dk_vector row_of(const dk_matrix &m, int64_t i) {
  const int64_t size = m.dtype == DK_FLOAT32 ? 4 : 2;
  return {static_cast<char *>(m.data) + i * m.row_stride * size, m.column_stride, m.dtype};
}

__device__ __forceinline__ dk_vector column_of(const dk_matrix &m, int64_t j) {
  return row_of({m.data, m.column_stride, m.row_stride, m.dtype}, j);
}

// Every so many-th element of a vector, from the first on, so that neighbouring threads read neighbours; outside: 0.
template <class T> __device__ __forceinline__ Eight spread(const dk_vector &v, int64_t first, int64_t length) {
  const T *from = static_cast<const T *>(v.data) + first * v.stride;
  Eight result;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    result.x[i] = first + i * THREADS < length ? wide(from[i * THREADS * v.stride]) : 0.0f;
  return result;
}

__device__ __forceinline__ Eight load_eight(const dk_vector &v, int64_t first, int64_t length) {
  if (v.dtype == DK_FLOAT32) return spread<float>(v, first, length);
  if (v.dtype == DK_FLOAT16) return spread<half>(v, first, length);
  return spread<bf16>(v, first, length);
}

__device__ __forceinline__ void store_eight(const dk_vector &v, int64_t first, int64_t length, const Eight &value) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (first + i * THREADS < length) store(v.data, v.dtype, (first + i * THREADS) * v.stride, value.x[i]);
}

// x * by, element by element; by itself may be absent.
__device__ __forceinline__ void weigh(Eight &x, const dk_vector &by, int64_t first, int64_t length) {
  if (!by.data) return;
  const Eight weight = load_eight(by, first, length);
#pragma unroll
  for (int i = 0; i < 8; ++i) x.x[i] *= weight.x[i];
}

// Blocks up to r: rows of A; the next r: columns of B.
__global__ void __launch_bounds__(THREADS, 1)
    fold(dk_matrix A, dk_matrix B, dk_vector lam, dk_vector weight_norm, dk_matrix A_hat, dk_matrix B_hat, float *a,
         float *b, int64_t K, int64_t N, int r, float sign, float eps) {
  const int block = blockIdx.x, j = block < r ? block : block - r;
  const bool is_row = block < r;
  const dk_vector from = is_row ? row_of(A, j) : column_of(B, j), to = is_row ? row_of(A_hat, j) : column_of(B_hat, j);
  const int64_t length = is_row ? K : N;
  float factor = 1;
  if (lam.data) {
    float squares = 0;
    for (int64_t e = threadIdx.x; e < length; e += 8 * THREADS) {
      const Eight x = load_eight(from, e, length);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += x.x[i] * x.x[i];
    }
    const float norm = sqrtf(block_sum(squares));
    if (threadIdx.x == 0) (is_row ? a : b)[j] = norm;
    factor = inverse_of(norm, eps);
    if (!is_row) factor *= load(lam, 0) * sign / static_cast<float>(r);
  }
  const dk_vector weight{is_row && lam.data ? weight_norm.data : nullptr, weight_norm.stride, weight_norm.dtype};
  for (int64_t e = threadIdx.x; e < length; e += 8 * THREADS) {
    Eight x = load_eight(from, e, length);
#pragma unroll
    for (int i = 0; i < 8; ++i) x.x[i] *= factor;
    weigh(x, weight, e, length);
    store_eight(to, e, length, x);
  }
}

// The gradient of factor / max(norm, eps) times `strength`: what lies along the vector drops out. With `weight`, the
// gradient is multiplied by it first. Returns the product of the gradient with the unit vector.
__device__ __forceinline__ float normalise_backward(const dk_vector &grad, const dk_vector &factor,
                                                    const dk_vector &weight, const dk_vector &out, float norm,
                                                    float eps, float strength, int64_t length) {
  const float inverse = inverse_of(norm, eps);
  float products = 0;
  for (int64_t e = threadIdx.x; e < length; e += 8 * THREADS) {
    Eight g = load_eight(grad, e, length);
    const Eight f = load_eight(factor, e, length);
    weigh(g, weight, e, length);
#pragma unroll
    for (int i = 0; i < 8; ++i) products += g.x[i] * f.x[i];
  }
  const float along = block_sum(products) * inverse;
  if (out.data) {
    const float drop = norm >= eps ? along * inverse * inverse : 0.0f;
    for (int64_t e = threadIdx.x; e < length; e += 8 * THREADS) {
      Eight g = load_eight(grad, e, length);
      const Eight f = load_eight(factor, e, length);
      weigh(g, weight, e, length);
#pragma unroll
      for (int i = 0; i < 8; ++i) g.x[i] = (g.x[i] * inverse - f.x[i] * drop) * strength;
      store_eight(out, e, length, g);
    }
  }
  return along;
}

// Blocks up to r: rows of dA; the next r: columns of dB and their parts of dlam; then those of the frozen start.
__global__ void __launch_bounds__(THREADS, 1)
    fold_backward(dk_matrix dA_hat, dk_matrix dB_hat, dk_matrix A, dk_matrix B, dk_vector lam, dk_vector weight_norm,
                  dk_matrix frozen_B, const float *a, const float *b, dk_matrix dA, dk_matrix dB, float *along,
                  int64_t K, int64_t N, int r, int r0, float eps) {
  const int block = blockIdx.x, j = block - r;
  const bool is_row = block < r, live = j < r;
  if (!(is_row ? dA_hat.data : dB_hat.data)) return;
  const dk_vector none{nullptr, 0, 0}, grad = is_row ? row_of(dA_hat, block) : column_of(dB_hat, j);
  const dk_vector factor = is_row ? row_of(A, block) : live ? column_of(B, j) : column_of(frozen_B, j - r);
  const dk_vector out = is_row ? row_of(dA, block) : live ? column_of(dB, j) : none;
  const dk_vector weight{is_row ? weight_norm.data : nullptr, weight_norm.stride, weight_norm.dtype};
  const float strength = is_row ? 1 : live ? load(lam, 0) / static_cast<float>(r) : 0;
  const float part = normalise_backward(grad, factor, weight, out, is_row ? a[block] : b[j], eps,
                                        strength, is_row ? K : N);
  if (!is_row && threadIdx.x == 0) along[j] = live ? part / static_cast<float>(r) : -part / static_cast<float>(r0);
}

}  // namespace dk

int dk_fold(dk_matrix A, dk_matrix B, dk_vector lam, dk_vector weight_norm, dk_matrix A_hat, dk_matrix B_hat, float *a,
            float *b, int64_t K, int64_t N, int64_t r, float sign, float eps, void *stream) {
  using namespace dk;
  if (!known(A.dtype) || !known(B.dtype) || !known(A_hat.dtype) || !known(B_hat.dtype)) return DK_BAD_DTYPE;
  if (lam.data && (!known(lam.dtype) || !known(weight_norm.dtype))) return DK_BAD_DTYPE;
  if (lam.data && !(weight_norm.data && a && b)) return DK_MISSING;
  if (r > 1 << 29) return DK_BAD_SIZE;
  return launch<Scratch>(fold, dim3(2 * r), stream, A, B, lam, weight_norm, A_hat, B_hat, a, b, K, N, r, sign, eps);
}

int dk_fold_backward(dk_matrix dA_hat, dk_matrix dB_hat, dk_matrix A, dk_matrix B, dk_vector lam, dk_vector weight_norm,
                     dk_matrix frozen_B, const float *a, const float *b, dk_matrix dA, dk_matrix dB, float *along,
                     int64_t K, int64_t N, int64_t r, int64_t r0, float eps, void *stream) {
  using namespace dk;
  if (!known(A.dtype) || !known(B.dtype) || !known(lam.dtype) || !known(weight_norm.dtype)) return DK_BAD_DTYPE;
  if (r0 && !frozen_B.data) return DK_MISSING;
  if (r + r0 > 1 << 29) return DK_BAD_SIZE;
  return launch<Scratch>(fold_backward, dim3(2 * r + (dB_hat.data ? r0 : 0)), stream, dA_hat, dB_hat, A, B, lam,
                         weight_norm, frozen_B, a, b, dA, dB, along, K, N, r, r0, eps);
}
