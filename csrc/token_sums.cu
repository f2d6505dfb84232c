// What one read of a token-sized matrix sums up over tokens: x^T h (dA_hat, dy^T h), sum_t x, sum_t x * y.
//
// A block has 64 columns and BR ranks and walks along its part of the tokens, the next tiles on their way while one
// is multiplied; blocks with the first ranks sum the vectors too. The caller adds the parts.

#include "product.cuh"

namespace dk {

constexpr int BC = 64;

template <class X, class S, int BR, int BT, int STAGES> union Tiles {
  using M = Meeting<X, S>;
  struct {
    alignas(128) X x[STAGES][BT][BC + PAD<X>];
    alignas(128) typename M::Small h[2][M::PLANES][BT][BR + PAD<typename M::Small>];
  } in;
  alignas(128) float out[BC][BR + 4];
  float halves[2][BC];
};

// Tokens of a step: 64 where that fits, in registers too; and the tiles of x that are there or on their way.
template <class X, class S, int BR>
constexpr int STEP = sizeof(Tiles<X, S, BR, 64, 2>) <= 48 << 10 && sizeof(X) == 2 && BR < 64 ? 64 : 32;
template <class X, class S, int BR>
constexpr int STAGES = sizeof(Tiles<X, S, BR, STEP<X, S, BR>, 3>) <= 48 << 10 ? 3 : 2;
template <class X, class S, int BR> using Shared = Tiles<X, S, BR, STEP<X, S, BR>, STAGES<X, S, BR>>;

template <class X, class S, int BR>
__global__ void __launch_bounds__(THREADS, 1)
    token_sums(Rows<X> x, Strided<S> h, Rows<X> y, float *product, float *sums, float *dots, int64_t T, int64_t C,
               int64_t R, int64_t part, bool transposed, const int64_t *seed, int threshold, float factor) {
  constexpr int BT = STEP<X, S, BR>, AHEAD = STAGES<X, S, BR> - 1, PLANES = Meeting<X, S>::PLANES;
  constexpr int LDX = BC + PAD<X>, LDH = BR + PAD<typename Meeting<X, S>::Small>;
  auto &tiles = shared_memory<Shared<X, S, BR>>();
  const int64_t c0 = static_cast<int64_t>(blockIdx.x) * BC, r0 = static_cast<int64_t>(blockIdx.y) * BR;
  const int64_t first = blockIdx.z * part, last = first + part < T ? first + part : T;
  const Mask mask(seed, threshold, C);
  // of the vectors each thread has one column, and half of the tokens
  const int column = threadIdx.x % BC, half_of = threadIdx.x / BC;
  const bool sums_here = sums && blockIdx.y == 0, dots_here = dots && blockIdx.y == 0 && c0 + column < C;
  float sum = 0, dot = 0;
  typename Meeting<X, S>::template Product<BC / 16, BR / 16> total;
  SmallTile<S, BT, BR> next;
  total.clear();
  for (int stage = 0; stage < AHEAD; ++stage)
    start_tile<BT, BC>(tiles.in.x[stage], x, first + stage * BT, c0, last, C);
  if (product && first < last) {
    next.load(h, first, r0, last, R);
    next.template store<PLANES>(h, tiles.in.h[0]);
  }
  int now = 0, side = 0;
  for (int64_t t = first; t < last; t += BT, now = now == AHEAD ? 0 : now + 1, side ^= 1) {
    __pipeline_wait_prior(AHEAD - 1);
    __syncthreads();
    if (sums_here || dots_here)
#pragma unroll 4
      for (int i = half_of; i < BT; i += 2) {
        const float value = wide(tiles.in.x[now][i][column]);
        sum += value;
        if (dots_here && t + i < last) dot += value * wide(y.data[(t + i) * y.stride + c0 + column]);
      }
    if (mask.drops) {
      if (blockIdx.y == 0) __syncthreads();  // not by thread: the sums above read what others drop
      drop_tile<BT, BC>(tiles.in.x[now], mask, t, c0);
      __syncthreads();
    }
    start_tile<BT, BC>(tiles.in.x[now ? now - 1 : AHEAD], x, t + AHEAD * BT, c0, last, C);
    if (product) {
      if (t + BT < last) next.load(h, t + BT, r0, last, R);
#pragma unroll
      for (int p = PLANES - 1; p >= 0; --p)
        total.template add<true, BT, LDX, LDH>(tiles.in.x[now][0], tiles.in.h[side][p][0]);
      if (t + BT < last) next.template store<PLANES>(h, tiles.in.h[side ^ 1]);
    }
  }
  __syncthreads();
  if (product) {
    total.store(tiles.out);
    __syncthreads();
    for (int i = threadIdx.x; i < BC * BR; i += THREADS) {
      const int c = transposed ? i % BC : i / BR, r = transposed ? i / BC : i % BR;
      const int64_t row = transposed ? blockIdx.z * R + r0 + r : blockIdx.z * C + c0 + c;
      if (c0 + c < C && r0 + r < R)
        product[transposed ? row * C + c0 + c : row * R + r0 + r] = factor * tiles.out[c][r];
    }
    __syncthreads();
  }
  for (int which = 0; which < 2; ++which) {
    float *to = which ? dots : sums;
    if (!to || blockIdx.y > 0) continue;
    tiles.halves[half_of][column] = which ? dot : sum;
    __syncthreads();
    if (half_of == 0 && c0 + column < C)
      to[blockIdx.z * C + c0 + column] = tiles.halves[0][column] + tiles.halves[1][column];
    __syncthreads();
  }
}

template <class X, class S, int BR>
int launch_token_sums(const dk_matrix &x, const dk_matrix &h, const dk_matrix &y, float *product, float *sums,
                      float *dots, int64_t T, int64_t C, int64_t R, int64_t parts, bool transposed, const int64_t *seed,
                      int threshold, float factor, void *stream) {
  constexpr int BT = STEP<X, S, BR>;
  const int64_t part = tiles(tiles(T, BT), parts) * BT, ranks = product ? tiles(R, BR) : 1;
  return launch<Shared<X, S, BR>>(token_sums<X, S, BR>, dim3(tiles(C, BC), ranks, parts), stream, Rows<X>(x),
                                     Strided<S>(h), Rows<X>(y), product, sums, dots, T, C, R, part, transposed, seed,
                                     threshold, factor);
}

}  // namespace dk

int dk_token_sums(dk_matrix x, dk_matrix h, dk_matrix y, float *product, float *sums, float *dots, int64_t T, int64_t C,
                  int64_t R, int64_t parts, int32_t transposed, const int64_t *seed, int32_t threshold, float factor,
                  void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(h) || !is_rows(y)) return DK_BAD_STRIDE;
  if (parts < 1 || parts > 65535) return DK_BAD_SIZE;
  if (y.data && y.dtype != x.dtype) return DK_BAD_DTYPE;
  if ((product && !h.data) || (dots && !y.data)) return DK_MISSING;
  return by_dtypes(x.dtype, h.data ? h.dtype : x.dtype, [&](auto X, auto S) {
    auto run = R <= 16   ? launch_token_sums<decltype(X), decltype(S), 16>
               : R <= 32 ? launch_token_sums<decltype(X), decltype(S), 32>
                         : launch_token_sums<decltype(X), decltype(S), 64>;
    return run(x, h, y, product, sums, dots, T, C, R, parts, transposed, seed, threshold, factor, stream);
  });
}
