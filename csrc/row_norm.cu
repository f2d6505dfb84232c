// DoRA's norm of every row of W + scale * B_hat A_hat, c = m / norm, and on request c * W, from one read of W.
//
// A block has 16 rows and walks along K in tiles of 128 columns; B_hat A_hat exists a tile at a time. c * W reads the
// block's rows again right after, from the cache.

#include "product.cuh"

namespace dk {

constexpr int BN = 16, BC = 128, BK = 16;

template <class X, class S> struct Tiles {
  using Small = typename Meeting<X, S>::Small;
  alignas(128) Small B[1][BN][BK + PAD<Small>];
  alignas(128) Small A[1][BK][BC + PAD<Small>];
  alignas(128) float update[BN][BC + 4];
};

// Float factors are not split here: c divides by the norm, which multiplies all that follows.
template <class X, class S> struct Exact : Meeting<X, S> {};
template <> struct Exact<bf16, float> : Meeting<half, float> {};

// Eight neighbours of W, which may lie transposed.
template <class X> __device__ __forceinline__ Eight load_eight(const Strided<X> &W, const Rows<X> &rows, int64_t n,
                                                               int64_t k, int64_t K) {
  if (W.column == 1) return load_eight(rows, n, k, K);
  Eight value;
#pragma unroll
  for (int i = 0; i < 8; ++i) value.x[i] = k + i < K ? wide(W.data[n * W.row + (k + i) * W.column]) : 0.0f;
  return value;
}

template <class X, class S>
__global__ void __launch_bounds__(THREADS, 1)
    row_norm(Strided<X> W, Rows<X> rows, Strided<S> A_hat, Strided<S> B_hat, dk_vector magnitude, float *norms,
             float *c, Rows<X> scaled, int64_t N, int64_t K, int64_t R, float scale) {
  constexpr int LDB = BK + PAD<typename Exact<X, S>::Small>, LDA = BC + PAD<typename Exact<X, S>::Small>;
  constexpr int LANES = BC / 8, STEP = THREADS / LANES;  // 16 threads have a row, each thread every eighth of them
  auto &tiles = shared_memory<Tiles<typename Exact<X, S>::Small, typename Exact<X, S>::Small>>();
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * BN;
  const int row = threadIdx.x / LANES, column = threadIdx.x % LANES * 8;
  float squares[BN / STEP] = {};
  for (int64_t k = 0; k < K; k += BC) {
    typename Exact<X, S>::template Product<BN / 16, BC / 64> product;
    product.clear();
    for (int64_t r = 0; r < R; r += BK) {
      SmallTile<S, BN, BK> left;
      SmallTile<S, BK, BC> right;
      left.load(B_hat, n0, r, N, R);
      right.load(A_hat, r, k, R, K);
      __syncthreads();
      left.template store<1>(B_hat, tiles.B);
      right.template store<1>(A_hat, tiles.A);
      __syncthreads();
      product.template add<false, BK, LDB, LDA>(tiles.B[0][0], tiles.A[0][0]);
    }
    product.store(tiles.update);  // the barriers above stand between this and the last tile's reads
    __syncthreads();
#pragma unroll
    for (int i = 0; i < BN / STEP; ++i) {
      const int n = row + i * STEP;
      if (n0 + n >= N || k + column >= K) continue;
      const Eight w = load_eight(W, rows, n0 + n, k + column, K);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float updated = w.x[j] + scale * tiles.update[n][column + j];
        squares[i] += updated * updated;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < BN / STEP; ++i) {
    float sum = squares[i];
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    const int64_t n = n0 + row + i * STEP;
    if (n >= N) continue;
    const float norm = sqrtf(sum);
    if (column == 0) norms[n] = norm;
    if (!magnitude.data) continue;
    const float factor = norm == 0 ? 0 : load(magnitude, n) / norm;
    if (column == 0) c[n] = factor;
    if (!scaled.data) continue;
    for (int64_t k = column; k < K; k += BC) {
      Eight w = load_eight(W, rows, n, k, K);
#pragma unroll
      for (int j = 0; j < 8; ++j) w.x[j] *= factor;
      store_eight(scaled, n, k, K, w);
    }
  }
}

}  // namespace dk

int dk_row_norm(dk_matrix W, dk_matrix A_hat, dk_matrix B_hat, dk_vector magnitude, float *norm, float *c,
                dk_matrix scaled, int64_t N, int64_t K, int64_t R, float scale, void *stream) {
  using namespace dk;
  if (!is_rows(scaled)) return DK_BAD_STRIDE;
  if (A_hat.dtype != B_hat.dtype || (magnitude.data && !known(magnitude.dtype))) return DK_BAD_DTYPE;
  if ((magnitude.data && !c) || (scaled.data && !magnitude.data)) return DK_MISSING;
  return by_dtypes(W.dtype, A_hat.dtype, [&](auto X, auto S) {
    using XT = decltype(X);
    using ST = decltype(S);
    using Small = typename Exact<XT, ST>::Small;
    return launch<Tiles<Small, Small>>(row_norm<XT, ST>, dim3(tiles(N, BN)), stream, Strided<XT>(W), Rows<XT>(W),
                                       Strided<ST>(A_hat), Strided<ST>(B_hat), magnitude, norm, c, Rows<XT>(scaled), N,
                                       K, R, scale);
  });
}
