// All that one read of dy [T, N] gives at ranks up to 32: dv = dy (c * small), dy^T h, sum_t dy, sum_t dy * y.
//
// A block has a part of the tokens and four tiles of 64 columns. It keeps its part of dy^T h in registers, one product
// for each tile, while it walks down its tokens, and writes its part of dv for each step; the caller adds the parts. At
// higher ranks the parts of dv would be more than a second read of dy: times_small and token_sums do the halves there.

#include <type_traits>

#include "column_sums.cuh"

namespace dk {

constexpr int BC = 64, ACROSS = 4, LARGEST_RANK = 32;

// Plain products read a small operand by rows, which meet no bank twice: only tensor cores' tiles end in padding, where
// there is room.
template <class X, int BR> constexpr bool PADDED = sizeof(X) == 2 || (std::is_same<X, tf32>::value && BR > 16);
template <class X, class Small, int BR> constexpr int LD = BR + (PADDED<X, BR> ? PAD<Small> : 0);

// How dy of type X meets `small` of type H; DORA: there is c, which multiplies it in float, or y.
template <class X, class H, bool DORA> using WithSmall = Meeting<X, std::conditional_t<DORA, float, H>>;

template <class X, class H, bool DORA, int BR, int BT, int STAGES> union Tiles {
  using ForS = WithSmall<X, H, DORA>;
  using ForH = Meeting<X, H>;
  struct {
    union {
      alignas(128) X dy[BT][BC + PAD<X>];
      alignas(128) float dv[BT][BR + 4];
    } stage[STAGES];
    alignas(128) typename ForS::Small small[2][ForS::PLANES][BC][LD<X, typename ForS::Small, BR>];
    alignas(128) typename ForH::Small h[ForH::PLANES][BT][LD<X, typename ForH::Small, BR>];
  } in;
  alignas(128) float out[BC][BR + 4];
  float vectors[2][THREADS / 32][ACROSS * BC];
};

// Tokens of a step: 64 where that fits; and the tiles of dy that are there or on their way.
template <class X, class H, bool DORA, int BR>
constexpr int STEP = BR == 16 || sizeof(Tiles<X, H, DORA, BR, 64, 2>) <= 48 << 10 ? 64 : 32;
template <class X, class H, bool DORA, int BR>
constexpr int STAGES = sizeof(Tiles<X, H, DORA, BR, STEP<X, H, DORA, BR>, 3>) <= 48 << 10 ? 3 : 2;
template <class X, class H, bool DORA, int BR>
using Shared = Tiles<X, H, DORA, BR, STEP<X, H, DORA, BR>, STAGES<X, H, DORA, BR>>;

template <class X, class H, bool DORA, int BR>
__global__ void __launch_bounds__(THREADS, 1)
    dy_sums(Rows<X> dy, Strided<H> small, const float *c, Strided<H> h, Rows<X> y, float *dv, float *product,
            float *sums, float *dots, int64_t T, int64_t N, int64_t R, int64_t part, float factor) {
  using ForS = WithSmall<X, H, DORA>;
  using ForH = Meeting<X, H>;
  if (!DORA) c = nullptr;  // known to the compiler, which then needs fewer registers
  const bool with_dots = DORA && dots;
  constexpr int BT = STEP<X, H, DORA, BR>, AHEAD = STAGES<X, H, DORA, BR> - 1;
  constexpr int LDX = BC + PAD<X>, LDS = LD<X, typename ForS::Small, BR>, LDH = LD<X, typename ForH::Small, BR>;
  auto &tiles = shared_memory<Shared<X, H, DORA, BR>>();
  auto &in = tiles.in;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * ACROSS * BC;
  const int64_t first = blockIdx.y * part, last = first + part < T ? first + part : T;
  float sum[ACROSS][2] = {}, dot[ACROSS][2] = {};
  ColumnSums<X, BT, BC> vectors{};
  typename ForS::template Product<BT / 16, BT / 16 * BR / 64> along;  // dv's part, [BT, BR]
  typename ForH::template Product<BC / 16, BR / 16> down[ACROSS];     // that of dy^T h, [BC, BR] each
  SmallTile<H, BC, BR> next_small;
  SmallTile<H, BT, BR> next_h;
#pragma unroll
  for (int j = 0; j < ACROSS; ++j) down[j].clear();
  for (int j = 0; j < AHEAD; ++j) start_tile<BT, BC>(in.stage[j].dy, dy, first, n0 + j * BC, last, N);
  if (first < last) {
    next_small.load(small, n0, 0, N, R);
    next_small.template store<ForS::PLANES>(small, in.small[0], c ? c + n0 : c, left(N, n0, BC));
    next_h.load(h, first, 0, last, R);
    next_h.template store<ForH::PLANES>(h, in.h);
    if (with_dots) vectors.load(y, first, n0, last, N);
  }
  int now = 0;
  for (int64_t t = first; t < last; t += BT) {
    along.clear();
#pragma unroll 1
    for (int j = 0; j < ACROSS; ++j) {
      const bool ends = j + 1 == ACROSS, ahead_ends = j + AHEAD >= ACROSS;
      const int64_t n = n0 + j * BC, next = ends ? n0 : n + BC, ahead = n + (ahead_ends ? AHEAD - ACROSS : AHEAD) * BC;
      const bool more = next < N && (!ends || t + BT < last);
      if (j > 0) now = now == AHEAD ? 0 : now + 1;
      auto &tile = in.stage[now].dy;
      __pipeline_wait_prior(AHEAD - 1);
      if (n < N && (sums || with_dots)) {
        float tile_sum[2] = {}, tile_dot[2] = {};
        vectors.add(tile, with_dots, tile_sum, tile_dot);
#pragma unroll
        for (int k = 0; k < ACROSS; ++k)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum[k][i] += k == j ? tile_sum[i] : 0;
            dot[k][i] += k == j ? tile_dot[i] : 0;
          }
      }
      if (with_dots && more) vectors.load(y, ends ? t + BT : t, next, last, N);
      __syncthreads();
      start_tile<BT, BC>(in.stage[now ? now - 1 : AHEAD].dy, dy, ahead_ends ? t + BT : t, ahead, last, N);
      if (more) next_small.load(small, next, 0, N, R);
      if (ends && t + BT < last) next_h.load(h, t + BT, 0, last, R);
      if (n < N) {
#pragma unroll
        for (int p = ForS::PLANES - 1; p >= 0; --p)
          along.template add<false, BC, LDX, LDS>(tile[0], in.small[j % 2][p][0]);
#pragma unroll
        for (int k = 0; k < ACROSS; ++k)
          if (k == j)
#pragma unroll
            for (int p = ForH::PLANES - 1; p >= 0; --p)
              down[k].template add<true, BT, LDX, LDH>(tile[0], in.h[p][0]);
      }
      if (more)
        next_small.template store<ForS::PLANES>(small, in.small[(j + 1) % 2], c ? c + next : c, left(N, next, BC));
    }
    __syncthreads();
    auto &done = in.stage[now].dv;  // where the tile was that nobody multiplies any more
    along.store(done);
    __syncthreads();
    for (int i = threadIdx.x; i < BT * BR; i += THREADS)
      if (t + i / BR < last && i % BR < R) dv[(blockIdx.x * T + t + i / BR) * R + i % BR] = done[i / BR][i % BR];
    if (t + BT < last) next_h.template store<ForH::PLANES>(h, in.h);
    now = now == AHEAD ? 0 : now + 1;
  }
#pragma unroll
  for (int j = 0; j < ACROSS; ++j) {
    const int64_t n = n0 + j * BC;
    if (n >= N) break;
    __syncthreads();
    down[j].store(tiles.out);
    __syncthreads();
    for (int i = threadIdx.x; i < BC * BR; i += THREADS)
      if (n + i / BR < N && i % BR < R)
        product[(blockIdx.y * N + n + i / BR) * R + i % BR] = factor * tiles.out[i / BR][i % BR];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < ACROSS; ++j) {
    vectors.put(tiles.vectors[0], j * BC, sum[j]);
    vectors.put(tiles.vectors[1], j * BC, dot[j]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ACROSS * BC && n0 + i < N; i += THREADS) {
    if (sums) sums[blockIdx.y * N + n0 + i] = vectors.total(tiles.vectors[0], i);
    if (with_dots) dots[blockIdx.y * N + n0 + i] = vectors.total(tiles.vectors[1], i);
  }
}

template <class X, class H, bool DORA, int BR>
int launch_dy_sums(const dk_matrix &dy, const dk_matrix &small, const float *c, const dk_matrix &h, const dk_matrix &y,
                   float *dv, float *product, float *sums, float *dots, int64_t T, int64_t N, int64_t R, int64_t parts,
                   float factor, void *stream) {
  constexpr int BT = STEP<X, H, DORA, BR>;
  const int64_t part = tiles(tiles(T, BT), parts) * BT;
  return launch<Shared<X, H, DORA, BR>>(dy_sums<X, H, DORA, BR>, dim3(tiles(N, ACROSS * BC), parts), stream,
                                        Rows<X>(dy), Strided<H>(small), c, Strided<H>(h), Rows<X>(y), dv, product, sums,
                                        dots, T, N, R, part, factor);
}

}  // namespace dk

int64_t dk_dy_sums_columns(void) { return dk::ACROSS * dk::BC; }

int dk_dy_sums(dk_matrix dy, dk_matrix small, const float *c, dk_matrix h, dk_matrix y, float *dv, float *product,
               float *sums, float *dots, int64_t T, int64_t N, int64_t R, int64_t parts, float factor,
               int32_t in_tf32, void *stream) {
  using namespace dk;
  if (!is_rows(dy) || !is_rows(y)) return DK_BAD_STRIDE;
  if (parts < 1 || parts > 65535 || R > LARGEST_RANK) return DK_BAD_SIZE;
  if ((y.data && y.dtype != dy.dtype) || small.dtype != h.dtype) return DK_BAD_DTYPE;
  if (!dv || !product || (dots && !y.data)) return DK_MISSING;
  return by_dtypes(dy.dtype, h.dtype, in_tf32, [&](auto X, auto H) {
    using XT = decltype(X);
    using HT = decltype(H);
    auto run = c || dots ? (R <= 16 ? launch_dy_sums<XT, HT, true, 16> : launch_dy_sums<XT, HT, true, 32>)
                         : (R <= 16 ? launch_dy_sums<XT, HT, false, 16> : launch_dy_sums<XT, HT, false, 32>);
    return run(dy, small, c, h, y, dv, product, sums, dots, T, N, R, parts, factor, stream);
  });
}
