// What one read of a token-sized matrix sums up over tokens: x^T h (dA_hat, dy^T h), sum_t x, sum_t x * y.
//
// A block has 64 columns and BR ranks and walks along its part of the tokens, the next tiles on their way while one
// is multiplied; blocks with the first ranks sum the vectors too. The caller adds the parts. WITH_TERM: while a block
// holds all ranks of h it also writes h small, the rank-R term of dx, to which a library GEMM then adds. Of rows sorted by
// expert, a block walks along part of one expert's: what it sums up goes to the expert's place, or to its parts'.

#include <type_traits>

#include "column_sums.cuh"
#include "groups.cuh"

namespace dk {

constexpr int BC = 64, MOST_RANKS = 64;

template <class X, class S, int BR, bool WITH_TERM> struct TermTiles {};

template <class X, class S, int BR> struct TermTiles<X, S, BR, true> {
  using Small = typename Meeting<X, S>::Small;
  static constexpr int SMALL_PLANES = Meeting<X, S>::PLANES > 1 ? 2 : 1;  // as in rank_update
  static constexpr int TERM = BC * sizeof(X) / sizeof(float);             // its columns that fit where a tile of x was
  alignas(128) Small small[SMALL_PLANES][BR][BC + PAD<Small>];
};

template <class X, class S, int BR, bool WITH_TERM, int BT, int STAGES> union Tiles {
  using M = Meeting<X, S>;
  struct In : TermTiles<X, S, BR, WITH_TERM> {
    union {
      alignas(128) X x[BT][BC + PAD<X>];
      alignas(128) float term[BT][BC * sizeof(X) / sizeof(float) + 4];
    } stage[STAGES];
    alignas(128) typename M::Small h[WITH_TERM ? 1 : 2][M::PLANES][BT][BR + PAD<typename M::Small>];
  } in;
  alignas(128) float out[BC][BR + 4];
  float vectors[2][THREADS / 32][BC];
};

// Tokens of a step: 64 where that fits, in registers too; and the tiles of x that are there or on their way.
template <class X, class S, int BR, bool WITH_TERM>
constexpr int STEP = sizeof(Tiles<X, S, BR, WITH_TERM, 64, 2>) <= 48 << 10 && sizeof(X) == 2 && BR < 64 ? 64 : 32;
template <class X, class S, int BR, bool WITH_TERM, int BT = STEP<X, S, BR, WITH_TERM>>
constexpr int STAGES = sizeof(Tiles<X, S, BR, WITH_TERM, BT, 3>) <= 48 << 10 ? 3 : 2;
template <class X, class S, int BR, bool WITH_TERM>
using Shared = Tiles<X, S, BR, WITH_TERM, STEP<X, S, BR, WITH_TERM>, STAGES<X, S, BR, WITH_TERM>>;

// The sums over rows first ... last - 1, to where product, sums and dots say.
template <class X, class S, int BR, bool WITH_TERM>
__device__ __forceinline__ void sum_up(const Rows<X> &x, const Strided<S> &h, const Rows<X> &y, const Strided<S> &small,
                                       const Rows<X> &out, float *product, float *sums, float *dots, int64_t first,
                                       int64_t last, int64_t C, int64_t R, int64_t ranks, bool transposed,
                                       const int64_t *seed, int threshold, float factor) {
  using M = Meeting<X, S>;
  using Small = typename M::Small;
  constexpr int BT = STEP<X, S, BR, WITH_TERM>, AHEAD = STAGES<X, S, BR, WITH_TERM> - 1, PLANES = M::PLANES;
  constexpr int LDX = BC + PAD<X>, LDH = BR + PAD<Small>;
  auto &tiles = shared_memory<Shared<X, S, BR, WITH_TERM>>();
  auto &in = tiles.in;
  using In = typename Shared<X, S, BR, WITH_TERM>::In;
  const int64_t c0 = static_cast<int64_t>(blockIdx.x) * BC, r0 = static_cast<int64_t>(blockIdx.y) * BR;
  const Mask mask(seed, threshold, C);
  const bool sums_here = !WITH_TERM && sums && blockIdx.y == 0, dots_here = !WITH_TERM && dots && blockIdx.y == 0;
  float sum[2] = {}, dot[2] = {};
  ColumnSums<X, BT, BC> vectors{};
  typename M::template Product<BC / 16, BR / 16> total;
  SmallTile<S, BT, BR> next;
  total.clear();
  for (int stage = 0; stage < AHEAD; ++stage)
    start_tile<BT, BC>(in.stage[stage].x, x, first + stage * BT, c0, last, C);
  if (product && first < last) {
    next.load(h, first, r0, last, R);
    next.template store<PLANES>(h, in.h[0]);
  }
  if (dots_here) vectors.load(y, first, c0, last, C);
  if constexpr (WITH_TERM) {
    SmallTile<S, BR, BC> once;
    once.load(small, 0, c0, R, C);
    once.template store<In::SMALL_PLANES>(small, in.small);
  }
  int now = 0, side = 0;
  for (int64_t t = first; t < last; t += BT, now = now == AHEAD ? 0 : now + 1) {
    auto &tile = in.stage[now].x;
    __pipeline_wait_prior(AHEAD - 1);
    if (sums_here || dots_here) vectors.add(tile, dots_here, sum, dot);
    if (dots_here && t + BT < last) vectors.load(y, t + BT, c0, last, C);
    if (mask.drops) drop_tile<BT, BC>(tile, mask, t, c0);
    __syncthreads();
    start_tile<BT, BC>(in.stage[now ? now - 1 : AHEAD].x, x, t + AHEAD * BT, c0, last, C);
    if (!product) continue;
    if (t + BT < last) next.load(h, t + BT, r0, last, R);
#pragma unroll
    for (int p = PLANES - 1; p >= 0; --p) total.template add<true, BT, LDX, LDH>(tile[0], in.h[side][p][0]);
    if constexpr (WITH_TERM) {
      constexpr int TERM = In::TERM, LDS = BC + PAD<Small>, WM = BT / 16;
      typename M::template Product<WM, TERM * WM / 64> term[BC / TERM];
#pragma unroll
      for (int k = 0; k < BC / TERM; ++k) {
        term[k].clear();
        if constexpr (In::SMALL_PLANES == 2) {
          term[k].template add<false, BR, LDH, LDS>(in.h[0][1][0], in.small[0][0] + k * TERM);
          term[k].template add<false, BR, LDH, LDS>(in.h[0][0][0], in.small[1][0] + k * TERM);
        }
        term[k].template add<false, BR, LDH, LDS>(in.h[0][0][0], in.small[0][0] + k * TERM);
      }
      __syncthreads();  // nobody multiplies this x and h any more
      if (t + BT < last) next.template store<PLANES>(h, in.h[0]);
#pragma unroll
      for (int k = 0; k < BC / TERM; ++k) {
        auto &done = in.stage[now].term;
        if (k > 0) __syncthreads();
        term[k].store(done);
        __syncthreads();
        const int c = threadIdx.x % (TERM / 8) * 8;
        for (int i = threadIdx.x / (TERM / 8); i < BT && t + i < last; i += THREADS / (TERM / 8)) {
          Eight value;
#pragma unroll
          for (int j = 0; j < 8; ++j) value.x[j] = factor * done[i][c + j];
          if (mask.drops) mask.drop(value, t + i, c0 + k * TERM + c);
          store_eight(out, t + i, c0 + k * TERM + c, C, value);
        }
      }
    } else {
      side ^= 1;
      if (t + BT < last) next.template store<PLANES>(h, in.h[side]);
    }
  }
  __syncthreads();
  if (product) {
    total.store(tiles.out);
    __syncthreads();
    for (int i = threadIdx.x; i < BC * BR; i += THREADS) {
      const int c = transposed ? i % BC : i / BR, r = transposed ? i / BC : i % BR;
      if (c0 + c < C && r0 + r < ranks)
        product[transposed ? (r0 + r) * C + c0 + c : (c0 + c) * ranks + r0 + r] = factor * tiles.out[c][r];
    }
    __syncthreads();
  }
  if (sums_here || dots_here) {
    vectors.put(tiles.vectors[0], 0, sum);
    vectors.put(tiles.vectors[1], 0, dot);
    __syncthreads();
    const int c = threadIdx.x % BC;
    float *to = threadIdx.x < BC ? sums : dots;
    if (to && c0 + c < C) to[c0 + c] = vectors.total(tiles.vectors[threadIdx.x / BC], c);
  }
}

template <class X, class S, int BR, bool WITH_TERM>
__global__ void __launch_bounds__(THREADS, 1)
    token_sums(Rows<X> x, Strided<S> h, Rows<X> y, Strided<S> small, Rows<X> out, float *product, float *sums,
               float *dots, int64_t T, int64_t C, int64_t R, int64_t ranks, int64_t part, bool transposed,
               const int64_t *seed, int threshold, float factor) {
  const int64_t which = blockIdx.z, first = which * part, last = first + part < T ? first + part : T;
  sum_up<X, S, BR, WITH_TERM>(x, h, y, small, out, product ? product + which * ranks * C : nullptr,
                              sums ? sums + which * C : nullptr, dots ? dots + which * C : nullptr, first, last, C, R,
                              ranks, transposed, seed, threshold, factor);
}

template <class X, class S, int BR>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_sums(Rows<X> x, Strided<S> h, Groups groups, float *product, float *sums, float *parts, int64_t C,
                 int64_t R, int64_t part, const int64_t *seed, int threshold, float factor) {
  const Tile tile = groups.find(blockIdx.z, part, 1);
  if (tile.expert >= groups.E) return;
  // offsets that fall, which nobody reads before, would ask for more places than there are
  if (!tile.alone && (!parts || tile.place >= 2 * groups.T / part)) return;
  const int64_t last = tile.first + part < tile.end ? tile.first + part : tile.end;
  const int64_t of_product = product ? R * C : 0, place = tile.place * (of_product + (sums ? C : 0));
  if (product) product = tile.alone ? product + tile.expert * R * C : parts + place;
  if (sums) sums = tile.alone ? sums + tile.expert * C : parts + place + of_product;
  const Rows<X> no_rows(dk_matrix{});
  sum_up<X, S, BR, false>(x, h, no_rows, Strided<S>(dk_matrix{}), no_rows, product, sums, nullptr, tile.first, last, C,
                          R, R, true, seed, threshold, factor);
}

template <class X, class S, int BR>
int launch_grouped_sums(const dk_matrix &x, const dk_matrix &h, const Groups &groups, float *product, float *sums,
                        float *parts, int64_t C, int64_t R, int64_t part, const int64_t *seed, int threshold,
                        float factor, void *stream) {
  const dim3 grid(tiles(C, BC), product ? tiles(R, BR) : 1, groups.T / part + groups.E);
  return launch<Shared<X, S, BR, false>>(grouped_sums<X, S, BR>, grid, stream, Rows<X>(x), Strided<S>(h), groups,
                                         product, sums, parts, C, R, part, seed, threshold, factor);
}

template <class X, class S, int BR, bool WITH_TERM>
int launch_token_sums(const dk_matrix &x, const dk_matrix &h, const dk_matrix &y, const dk_matrix &small,
                      const dk_matrix &out, float *product, float *sums, float *dots, int64_t T, int64_t C, int64_t R,
                      int64_t ranks, int64_t parts, bool transposed, const int64_t *seed, int threshold, float factor,
                      void *stream) {
  constexpr int BT = STEP<X, S, BR, WITH_TERM>;
  const int64_t part = tiles(tiles(T, BT), parts) * BT;
  return launch<Shared<X, S, BR, WITH_TERM>>(token_sums<X, S, BR, WITH_TERM>,
                                             dim3(tiles(C, BC), product ? tiles(R, BR) : 1, parts), stream, Rows<X>(x),
                                             Strided<S>(h), Rows<X>(y), Strided<S>(small), Rows<X>(out), product, sums,
                                             dots, T, C, R, ranks, part, transposed, seed, threshold, factor);
}

}  // namespace dk

int dk_token_sums(dk_matrix x, dk_matrix h, dk_matrix y, dk_matrix small, dk_matrix out, float *product, float *sums,
                  float *dots, int64_t T, int64_t C, int64_t R, int64_t ranks, int64_t parts, int32_t transposed,
                  const int64_t *seed, int32_t threshold, float factor, int32_t in_tf32, void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(h) || !is_rows(y) || !is_rows(out)) return DK_BAD_STRIDE;
  const bool term = out.data != nullptr;
  if (parts < 1 || parts > 65535 || ranks > R || (term && R > MOST_RANKS)) return DK_BAD_SIZE;
  if (y.data && y.dtype != x.dtype) return DK_BAD_DTYPE;
  if (term && (out.dtype != x.dtype || small.dtype != h.dtype)) return DK_BAD_DTYPE;
  if ((product && !h.data) || (dots && !y.data) || (term && !(product && small.data))) return DK_MISSING;
  return by_dtypes(x.dtype, h.data ? h.dtype : x.dtype, in_tf32, [&](auto X, auto S) {
    auto by_rank = [&](auto with_term) {
      using XT = decltype(X);
      using ST = decltype(S);
      constexpr bool TERM = decltype(with_term)::value;
      return R <= 16   ? launch_token_sums<XT, ST, 16, TERM>
             : R <= 32 ? launch_token_sums<XT, ST, 32, TERM>
                       : launch_token_sums<XT, ST, MOST_RANKS, TERM>;
    };
    auto run = term ? by_rank(std::true_type{}) : by_rank(std::false_type{});
    return run(x, h, y, small, out, product, sums, dots, T, C, R, ranks, parts, transposed, seed, threshold, factor,
               stream);
  });
}

int dk_grouped_sums(dk_matrix x, dk_matrix h, const void *offsets, int32_t in_64_bits, float *product, float *sums,
                    float *parts, int64_t T, int64_t C, int64_t R, int64_t E, int64_t part, const int64_t *seed,
                    int32_t threshold, float factor, int32_t in_tf32, void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(h)) return DK_BAD_STRIDE;
  if (part < 1 || T / part + E > 65535) return DK_BAD_SIZE;
  if ((product && !h.data) || (part < T && !parts)) return DK_MISSING;
  return by_dtypes(x.dtype, h.data ? h.dtype : x.dtype, in_tf32, [&](auto X, auto S) {
    using XT = decltype(X);
    using ST = decltype(S);
    auto run = R <= 16   ? launch_grouped_sums<XT, ST, 16>
               : R <= 32 ? launch_grouped_sums<XT, ST, 32>
                         : launch_grouped_sums<XT, ST, MOST_RANKS>;
    return run(x, h, Groups{offsets, in_64_bits != 0, E, T}, product, sums, parts, C, R, part, seed, threshold, factor,
               stream);
  });
}
