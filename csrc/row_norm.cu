// DoRA's norm of every row of W + scale * B_hat A_hat, c = m / norm, and on request c * W, from one read of W.
//
// A block has 16 rows and walks along K in tiles of 128 columns, the next ones of W and A_hat on their way while one is
// multiplied. A tile of B_hat A_hat exists in registers alone, where W and the sums of squares come to it. c * W walks
// back over the rows: what was read last is still in the cache.

#include "product.cuh"

namespace dk {

constexpr int BN = 16, BC = ASYNC ? 128 : 64, BK = 16;

// Float factors are not made planes of W's type: c divides by the norm, which multiplies all that follows.
template <class X, class S> struct Exact : Meeting<X, S> {};
template <> struct Exact<bf16, float> : Meeting<half, float> {};

template <class X, class S, int STAGES> struct Tiles {
  static_assert(sizeof(S) == sizeof(typename Exact<X, S>::Small), "factors are multiplied as they are");
  union Stage {
    struct {
      union {
        alignas(128) X row[BN][BC + PAD<X>];
        alignas(128) X column[BC][BN + (sizeof(X) == 2 ? 0 : PAD<X>)];  // of a W that lies transposed
      } W;
      alignas(128) S A[BK][BC + PAD<S>];
    } in;
    alignas(128) float sums[BN][BC + 4];
  } stage[STAGES];
  alignas(128) S B[2][BN][BK + PAD<S>];
  float factor[BN];
};

template <class X, class S, int STAGES> constexpr bool FITS = ASYNC && sizeof(Tiles<X, S, STAGES>) <= 48 << 10;
template <class X, class S> constexpr int STAGES = FITS<X, S, 4> ? 4 : FITS<X, S, 3> ? 3 : 2;

template <class X, class S>
__global__ void __launch_bounds__(THREADS, 4)
    row_norm(Rows<X> W, bool transposed, Rows<S> A_hat, Strided<S> B_hat, dk_vector magnitude, float *norms, float *c,
             Rows<X> scaled, int64_t N, int64_t K, int64_t R, float scale) {
  using Product = typename Exact<X, S>::template Product<BN / 16, BC / 64>;
  constexpr int AHEAD = STAGES<X, S> - 1, LDA = BC + PAD<S>, LDB = BK + PAD<S>, LANES = THREADS / BN;
  auto &tiles = shared_memory<Tiles<X, S, STAGES<X, S>>>();
  auto &stage = tiles.stage;
  constexpr int DOWN = sizeof(stage->in.W.row[0]) / sizeof(X), ACROSS = sizeof(stage->in.W.column[0]) / sizeof(X);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * BN, last = (K - 1) / BC;
  int64_t next_r = 0, next_k = 0;
  const auto start_W = [&](int to, int64_t k) {
    if (transposed) start_tile<BC, BN>(stage[to].in.W.column, W, k, n0, K, N);
    else start_tile<BN, BC>(stage[to].in.W.row, W, n0, k, N, K);
  };
  const auto start_A = [&](int to) {
    start_tile<BK, BC>(stage[to].in.A, A_hat, next_r, next_k, R, K);
    next_r += BK;
    if (next_r >= R) next_r = 0, next_k += BC;
  };
  Product product, place, squares;  // place: where a tile of W has what meets each element of the product
  for (int i = threadIdx.x; i < BN * BC; i += THREADS) {
    const int n = i / BC, k = i % BC;
    stage[AHEAD].sums[n][k] = __int_as_float(transposed ? n + k * ACROSS : n * DOWN + k);
  }
  for (int i = 0; i < AHEAD; ++i) start_W(i, i * BC), start_A(i);
  SmallTile<S, BN, BK> left;
  left.load(B_hat, n0, 0, N, R);
  left.template store<1>(B_hat, tiles.B);
  __syncthreads();
  place.load(stage[AHEAD].sums);
  squares.clear();
  int w = 0, a = 0, side = 0;
  const auto add_squares = [&] {
    Product::zip([&, here = stage[w].in.W.row[0]](float term, float at, float &square) {
      const float updated = wide(here[__float_as_int(at)]) + scale * term;
      square += updated * updated;
    }, product, place, squares);
  };
  for (int64_t k = 0; k < K; k += BC, w = w == AHEAD ? 0 : w + 1) {
    product.clear();
    for (int64_t r = 0; r < R; r += BK, a = a == AHEAD ? 0 : a + 1) {
      __pipeline_wait_prior(2 * AHEAD - 2);
      __syncthreads();
      start_W(w ? w - 1 : AHEAD, r == 0 ? k + AHEAD * BC : K);
      start_A(a ? a - 1 : AHEAD);
      if (R > BK) left.load(B_hat, n0, r + BK < R ? r + BK : 0, N, R);
      product.template add<false, BK, LDB, LDA>(tiles.B[side][0], stage[a].in.A[0]);
      if (R > BK) left.template store<1>(B_hat, tiles.B + (side ^= 1));
    }
    if (K - k < BC) break;
    add_squares();
  }
  if (K % BC) {  // what is outside is no 0 where B_hat is infinite
    Product::zip([&](float &term, float at) {
      const int i = __float_as_int(at);
      if ((transposed ? i / ACROSS : i % DOWN) >= K % BC) term = 0;
    }, product, place);
    add_squares();
  }
  __syncthreads();
  squares.store(stage[0].sums);
  __syncthreads();
  int n = threadIdx.x / LANES, part = threadIdx.x % LANES;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < BC; k += LANES) sum += stage[0].sums[n][k + part];
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (part == 0 && n0 + n < N) {
    const float norm = norms[n0 + n] = sqrtf(sum);
    if (magnitude.data) c[n0 + n] = tiles.factor[n] = norm == 0 ? 0 : load(magnitude, n0 + n) / norm;
  }
  if (!scaled.data) return;
  __syncthreads();
  for (int i = 0; i < AHEAD; ++i) start_W(i, i <= last ? (last - i) * BC : K);
  if (transposed) n = threadIdx.x % BN, part = threadIdx.x / BN;
  w = 0;
  for (int64_t i = last; i >= 0; --i, w = w == AHEAD ? 0 : w + 1) {
    __pipeline_wait_prior(AHEAD - 1);
    __syncthreads();
    start_W(w ? w - 1 : AHEAD, i >= AHEAD ? (i - AHEAD) * BC : K);
#pragma unroll
    for (int first = 0; first < BC; first += LANES * 8) {
      const int k = first + part * 8;
      if (n0 + n >= N || i * BC + k >= K) continue;
      Eight value;
      if (!transposed) value = load_eight(&stage[w].in.W.row[n][k]);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        value.x[j] = tiles.factor[n] * (transposed ? wide(stage[w].in.W.column[k + j][n]) : value.x[j]);
      store_eight(scaled, n0 + n, i * BC + k, K, value);
    }
  }
}

}  // namespace dk

int dk_row_norm(dk_matrix W, dk_matrix A_hat, dk_matrix B_hat, dk_vector magnitude, float *norm, float *c,
                dk_matrix scaled, int64_t N, int64_t K, int64_t R, float scale, int32_t in_tf32,
                void *stream) {
  using namespace dk;
  const bool transposed = W.column_stride != 1;
  if ((transposed && W.row_stride != 1) || !is_rows(A_hat) || !is_rows(scaled)) return DK_BAD_STRIDE;
  if (A_hat.dtype != B_hat.dtype || (magnitude.data && !known(magnitude.dtype))) return DK_BAD_DTYPE;
  if ((magnitude.data && !c) || (scaled.data && !magnitude.data)) return DK_MISSING;
  if (R < 1) return DK_BAD_SIZE;
  if (transposed) W.row_stride = W.column_stride;
  return by_dtypes(W.dtype, A_hat.dtype, in_tf32, [&](auto X, auto S) {
    using XT = decltype(X);
    using ST = decltype(S);
    return launch<Tiles<XT, ST, STAGES<XT, ST>>>(row_norm<XT, ST>, dim3(tiles(N, BN)), stream, Rows<XT>(W), transposed,
                                                 Rows<ST>(A_hat), Strided<ST>(B_hat), magnitude, norm, c,
                                                 Rows<XT>(scaled), N, K, R, scale);
  });
}
