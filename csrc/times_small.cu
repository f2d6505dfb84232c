// A token-sized matrix times a small one, [T, C] [C, R]: h = drop(x) A_hat^T, and dv = dy (c * B_hat).
//
// A block has 64 tokens and BR ranks and walks along C: the next tiles of x are on their way while one is multiplied.
// Where there are few tokens the sum over C is split among blocks, and the caller adds the parts. Where it is not, and
// one block has all columns of a mixture's h, it gates its tokens itself. Of rows sorted by expert, a block has 64 of one
// expert's, and multiplies them by its matrix.

#include "gating.cuh"
#include "groups.cuh"
#include "product.cuh"

namespace dk {

constexpr int BT = 64;

template <class X, class S, int BR, int BK, int STAGES> union Tiles {
  using M = Meeting<X, S>;
  struct {
    alignas(128) X x[STAGES][BT][BK + PAD<X>];
    alignas(128) typename M::Small small[2][M::PLANES][BK][BR + PAD<typename M::Small>];
  } in;
  struct {
    alignas(128) float out[BT][BR + 4];
    Experts<FEW_EXPERTS> experts;
  };
};

// Columns of a step: 64 where that fits, in registers too; and the tiles of x that are there or on their way.
template <class X, class S, int BR>
constexpr int STEP = sizeof(Tiles<X, S, BR, 64, 2>) <= 48 << 10 && sizeof(X) == 2 && BR < 64 ? 64 : 32;
template <class X, class S, int BR>
constexpr int STAGES = sizeof(Tiles<X, S, BR, STEP<X, S, BR>, 3>) <= 48 << 10 ? 3 : 2;
template <class X, class S, int BR> using Shared = Tiles<X, S, BR, STEP<X, S, BR>, STAGES<X, S, BR>>;

// tiles.out = x small for the 64 tokens from t0 and the BR ranks from r0 on, summed over columns first to last.
template <class X, class S, int BR>
__device__ __forceinline__ void multiply(Shared<X, S, BR> &tiles, const Rows<X> &x, const Strided<S> &small,
                                         const Mask &mask, int64_t t0, int64_t r0, int64_t first, int64_t last,
                                         int64_t T, int64_t R) {
  constexpr int BK = STEP<X, S, BR>, AHEAD = STAGES<X, S, BR> - 1, PLANES = Meeting<X, S>::PLANES;
  constexpr int LDX = BK + PAD<X>, LDS = BR + PAD<typename Meeting<X, S>::Small>;
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
}

template <class X, class S, int BR>
__global__ void __launch_bounds__(THREADS, 1)
    times_small(Rows<X> x, Strided<S> small, dk_matrix out, int64_t T, int64_t C, int64_t R, int64_t part,
                const int64_t *seed, int threshold, float factor) {
  auto &tiles = shared_memory<Shared<X, S, BR>>();
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BT, r0 = static_cast<int64_t>(blockIdx.y) * BR;
  const int64_t first = blockIdx.z * part, last = first + part < C ? first + part : C;
  multiply<X, S, BR>(tiles, x, small, Mask(seed, threshold, C), t0, r0, first, last, T, R);
  const int64_t row = blockIdx.z * T + t0;
  for (int i = threadIdx.x; i < BT * BR; i += THREADS)
    if (t0 + i / BR < T && r0 + i % BR < R) store(out, row + i / BR, r0 + i % BR, factor * tiles.out[i / BR][i % BR]);
}

// h = x small, gated: a block has whole rows of it.
template <class X, class S, int BR>
__global__ void __launch_bounds__(THREADS, 1)
    project_route(Rows<X> x, Strided<S> small, Gating g, int64_t C, const int64_t *seed, int threshold, float factor) {
  auto &tiles = shared_memory<Shared<X, S, BR>>();
  const Group<FEW_EXPERTS> group;
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BT;
  multiply<X, S, BR>(tiles, x, small, Mask(seed, threshold, C), t0, 0, 0, C, g.T, g.columns());
  tiles.experts.clear(g.E);
  for (int i = 0; i < BT; i += group.COUNT)
    tiles.experts.gate(g, t0 + i, tiles.out[i + group.index] + g.width(), [&](int64_t t, int64_t column) {
      const S h = narrow<S>(factor * tiles.out[t - t0][column]);
      static_cast<S *>(g.h.data)[t * g.h.row_stride + column] = h;
      return wide(h);
    });
  tiles.experts.write_sums(g);
}

template <class X, class S, int BR>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_times_small(Rows<X> x, Strided<S> small, int64_t by_expert, Groups groups, dk_matrix out, int64_t C,
                        int64_t R, const int64_t *seed, int threshold, float factor) {
  auto &tiles = shared_memory<Shared<X, S, BR>>();
  const Tile tile = groups.find(blockIdx.x, BT, 0);
  const bool somebodys = tile.expert < groups.E;
  if (tile.first >= tile.end) return;
  const int64_t t0 = tile.first, r0 = static_cast<int64_t>(blockIdx.y) * BR;
  multiply<X, S, BR>(tiles, x, of_expert(small, by_expert, somebodys ? tile.expert : 0), Mask(seed, threshold, C), t0,
                     r0, 0, somebodys ? C : 0, tile.end, R);
  for (int i = threadIdx.x; i < BT * BR; i += THREADS)
    if (t0 + i / BR < tile.end && r0 + i % BR < R)
      store(out, t0 + i / BR, r0 + i % BR, factor * tiles.out[i / BR][i % BR]);
}

template <class X, class S, int BR>
int launch_grouped_times_small(const dk_matrix &x, const dk_matrix &small, int64_t by_expert, const Groups &groups,
                               const dk_matrix &out, int64_t C, int64_t R, const int64_t *seed, int threshold,
                               float factor, void *stream) {
  const int64_t most = (groups.T + (groups.E + 1) * (BT - 1)) / BT;
  return launch<Shared<X, S, BR>>(grouped_times_small<X, S, BR>, dim3(most, tiles(R, BR)), stream, Rows<X>(x),
                                  Strided<S>(small), by_expert, groups, out, C, R, seed, threshold, factor);
}

template <class X, class S, int BR>
int launch_times_small(const dk_matrix &x, const dk_matrix &small, const dk_matrix &out, int64_t T, int64_t C, int64_t R,
                       int64_t parts, const int64_t *seed, int threshold, float factor, void *stream) {
  constexpr int BK = STEP<X, S, BR>;
  int64_t part = tiles(tiles(C, BK), parts) * BK;
  return launch<Shared<X, S, BR>>(times_small<X, S, BR>, dim3(tiles(T, BT), tiles(R, BR), parts), stream, Rows<X>(x),
                                  Strided<S>(small), out, T, C, R, part, seed, threshold, factor);
}

template <class X, class S, int BR>
int launch_project_route(const dk_matrix &x, const dk_matrix &small, const Gating &g, int64_t C, const int64_t *seed,
                         int threshold, float factor, void *stream) {
  return launch<Shared<X, S, BR>>(project_route<X, S, BR>, dim3(tiles(g.T, BT)), stream, Rows<X>(x), Strided<S>(small),
                                  g, C, seed, threshold, factor);
}

}  // namespace dk

int dk_times_small(dk_matrix x, dk_matrix small, dk_matrix out, int64_t T, int64_t C, int64_t R, int64_t parts,
                   const int64_t *seed, int32_t threshold, float factor, int32_t in_tf32, void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(out)) return DK_BAD_STRIDE;
  if (parts < 1 || parts > 65535) return DK_BAD_SIZE;
  if (!known(out.dtype)) return DK_BAD_DTYPE;
  return by_dtypes(x.dtype, small.dtype, in_tf32, [&](auto X, auto S) {
    auto run = R <= 16   ? launch_times_small<decltype(X), decltype(S), 16>
               : R <= 32 ? launch_times_small<decltype(X), decltype(S), 32>
                         : launch_times_small<decltype(X), decltype(S), 64>;
    return run(x, small, out, T, C, R, parts, seed, threshold, factor, stream);
  });
}

int dk_project_route(dk_matrix x, dk_matrix small, int64_t C, dk_matrix h, const float *gates, const float *scale,
                     const float *share, dk_matrix v, float *w, float *sums, int64_t T, int64_t E, int64_t r,
                     int64_t passed, int64_t top_k, int32_t renormalize, int32_t shared, const int64_t *seed,
                     int32_t threshold, float factor, int32_t in_tf32, void *stream) {
  using namespace dk;
  if (!is_rows(x)) return DK_BAD_STRIDE;
  if (h.dtype != small.dtype) return DK_BAD_DTYPE;
  if (!fits(E, r) || E > FEW_EXPERTS) return DK_BAD_SIZE;
  const Gating g{h, v, gates, scale, share, w, sums, T, passed, top_k, static_cast<int>(E), static_cast<int>(r),
                 renormalize != 0, shared != 0};
  if (const int status = g.status()) return status;
  if (g.columns() > 64) return DK_BAD_SIZE;
  return by_dtypes(x.dtype, small.dtype, in_tf32, [&](auto X, auto S) {
    auto run = g.columns() <= 16   ? launch_project_route<decltype(X), decltype(S), 16>
               : g.columns() <= 32 ? launch_project_route<decltype(X), decltype(S), 32>
                                   : launch_project_route<decltype(X), decltype(S), 64>;
    return run(x, small, g, C, seed, threshold, factor, stream);
  });
}

int dk_grouped_times_small(dk_matrix x, dk_matrix small, int64_t by_expert, const void *offsets, int32_t in_64_bits,
                           dk_matrix out, int64_t T, int64_t C, int64_t R, int64_t E, const int64_t *seed,
                           int32_t threshold, float factor, int32_t in_tf32, void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(out)) return DK_BAD_STRIDE;
  if (!known(out.dtype)) return DK_BAD_DTYPE;
  if (T == 0) return DK_OK;
  return by_dtypes(x.dtype, small.dtype, in_tf32, [&](auto X, auto S) {
    auto run = R <= 16   ? launch_grouped_times_small<decltype(X), decltype(S), 16>
               : R <= 32 ? launch_grouped_times_small<decltype(X), decltype(S), 32>
                         : launch_grouped_times_small<decltype(X), decltype(S), 64>;
    return run(x, small, by_expert, Groups{offsets, in_64_bits != 0, E, T}, out, C, R, seed, threshold, factor, stream);
  });
}
