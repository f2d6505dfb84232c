// A token-sized matrix times a small one, [T, C] [C, R]: h = drop(x) A_hat^T, and dv = dy (c * B_hat).
//
// A block has 64 tokens and BR ranks and walks along C: the next tiles of x are on their way while one is multiplied.
// Where there are few tokens the sum over C is split among blocks, and the caller adds the parts.

#include "product.cuh"

namespace dk {

constexpr int BT = 64;

template <class X, class S, int BR, int BK, int STAGES> union Tiles {
  using M = Meeting<X, S>;
  struct {
    alignas(128) X x[STAGES][BT][BK + PAD<X>];
    alignas(128) typename M::Small small[2][M::PLANES][BK][BR + PAD<typename M::Small>];
  } in;
  alignas(128) float out[BT][BR + 4];
};

// Columns of a step: 64 where that fits, in registers too; and the tiles of x that are there or on their way.
template <class X, class S, int BR>
constexpr int STEP = sizeof(Tiles<X, S, BR, 64, 2>) <= 48 << 10 && sizeof(X) == 2 && BR < 64 ? 64 : 32;
template <class X, class S, int BR>
constexpr int STAGES = sizeof(Tiles<X, S, BR, STEP<X, S, BR>, 3>) <= 48 << 10 ? 3 : 2;
template <class X, class S, int BR> using Shared = Tiles<X, S, BR, STEP<X, S, BR>, STAGES<X, S, BR>>;

template <class X, class S, int BR>
__global__ void __launch_bounds__(THREADS, 1)
    times_small(Rows<X> x, Strided<S> small, dk_matrix out, int64_t T, int64_t C, int64_t R, int64_t part,
                const int64_t *seed, int threshold, float factor) {
  constexpr int BK = STEP<X, S, BR>, AHEAD = STAGES<X, S, BR> - 1, PLANES = Meeting<X, S>::PLANES;
  constexpr int LDX = BK + PAD<X>, LDS = BR + PAD<typename Meeting<X, S>::Small>;
  auto &tiles = shared_memory<Shared<X, S, BR>>();
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BT, r0 = static_cast<int64_t>(blockIdx.y) * BR;
  const int64_t first = blockIdx.z * part, last = first + part < C ? first + part : C;
  const Mask mask(seed, threshold, C);
  typename Meeting<X, S>::template Product<BT / 16, BR / 16> product;
  SmallTile<S, BK, BR> next;
  product.clear();
  for (int stage = 0; stage < AHEAD; ++stage)
    start_tile<BT, BK>(tiles.in.x[stage], x, t0, first + stage * BK, T, last);
  if (first < last) {
    next.load(small, first, r0, last, R);
    next.template store<PLANES>(small, tiles.in.small[0]);
  }
  int now = 0, side = 0;
  for (int64_t k = first; k < last; k += BK, now = now == AHEAD ? 0 : now + 1, side ^= 1) {
    __pipeline_wait_prior(AHEAD - 1);
    if (mask.drops) drop_tile<BT, BK>(tiles.in.x[now], mask, t0, k);
    __syncthreads();
    start_tile<BT, BK>(tiles.in.x[now ? now - 1 : AHEAD], x, t0, k + AHEAD * BK, T, last);
    if (k + BK < last) next.load(small, k + BK, r0, last, R);
#pragma unroll
    for (int p = PLANES - 1; p >= 0; --p)
      product.template add<false, BK, LDX, LDS>(tiles.in.x[now][0], tiles.in.small[side][p][0]);
    if (k + BK < last) next.template store<PLANES>(small, tiles.in.small[side ^ 1]);
  }
  __syncthreads();
  product.store(tiles.out);
  __syncthreads();
  const int64_t row = blockIdx.z * T + t0;
  for (int i = threadIdx.x; i < BT * BR; i += THREADS)
    if (t0 + i / BR < T && r0 + i % BR < R) store(out, row + i / BR, r0 + i % BR, factor * tiles.out[i / BR][i % BR]);
}

template <class X, class S, int BR>
int launch_times_small(const dk_matrix &x, const dk_matrix &small, const dk_matrix &out, int64_t T, int64_t C, int64_t R,
                       int64_t parts, const int64_t *seed, int threshold, float factor, void *stream) {
  constexpr int BK = STEP<X, S, BR>;
  int64_t part = tiles(tiles(C, BK), parts) * BK;
  return launch<Shared<X, S, BR>>(times_small<X, S, BR>, dim3(tiles(T, BT), tiles(R, BR), parts), stream, Rows<X>(x),
                                     Strided<S>(small), out, T, C, R, part, seed, threshold, factor);
}

}  // namespace dk

int dk_times_small(dk_matrix x, dk_matrix small, dk_matrix out, int64_t T, int64_t C, int64_t R, int64_t parts,
                   const int64_t *seed, int32_t threshold, float factor, void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(out)) return DK_BAD_STRIDE;
  if (parts < 1 || parts > 65535) return DK_BAD_SIZE;
  if (!known(out.dtype)) return DK_BAD_DTYPE;
  return by_dtypes(x.dtype, small.dtype, [&](auto X, auto S) {
    auto run = R <= 16   ? launch_times_small<decltype(X), decltype(S), 16>
               : R <= 32 ? launch_times_small<decltype(X), decltype(S), 32>
                         : launch_times_small<decltype(X), decltype(S), 64>;
    return run(x, small, out, T, C, R, parts, seed, threshold, factor, stream);
  });
}
