// The rank-R term beside a library GEMM, in one pass over its output, rounded once:
//
//     out = c * (drop(base) + scale * drop(h small)) + extra + bias
//
// Form (b) updates what the GEMM wrote (out is base); form (d) has no base yet and writes what the GEMM then adds to.
// A block has a tile of 64 tokens and 64 columns; a thread finishes eight neighbours at a time, in 16-byte accesses.

#include "product.cuh"

namespace dk {

constexpr int BT = 64, BC = 64, BK = 16;

// How h and `small` of type S meet for a result of type X: float factors of a bfloat16 result become two planes each,
// whose three products sum up to what matters of a float's bits.
template <class X, class S> struct Pair : Meeting<X, S> {
  static constexpr int PLANES = sizeof(S) == 4 && sizeof(typename Meeting<X, S>::Small) == 2 ? 2 : 1;
};

template <class X, class S> union Tiles {
  using P = Pair<X, S>;
  struct {
    alignas(128) typename P::Small h[P::PLANES][BT][BK + PAD<typename P::Small>];
    alignas(128) typename P::Small small[P::PLANES][BK][BC + PAD<typename P::Small>];
  } in;
  alignas(128) float term[BT][BC + 4];
};

template <class X, class S>
__global__ void __launch_bounds__(THREADS, 1)
    rank_update(Rows<X> base, Strided<S> h, Strided<S> small, const float *c, Rows<X> extra, dk_vector bias,
                Rows<X> out, int64_t T, int64_t C, int64_t R, float scale, const int64_t *seed, int threshold,
                bool mask_base) {
  using P = Pair<X, S>;
  constexpr int LDH = BK + PAD<typename P::Small>, LDS = BC + PAD<typename P::Small>;
  auto &tiles = shared_memory<Tiles<X, S>>();
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * BT, c0 = static_cast<int64_t>(blockIdx.y) * BC;
  typename P::template Product<BT / 16, BC / 16> product;
  product.clear();
  for (int64_t r = 0; r < R; r += BK) {
    SmallTile<S, BT, BK> left;
    SmallTile<S, BK, BC> right;
    left.load(h, t0, r, T, R);
    right.load(small, r, c0, R, C);
    if (r > 0) __syncthreads();
    left.template store<P::PLANES>(h, tiles.in.h);
    right.template store<P::PLANES>(small, tiles.in.small);
    __syncthreads();
    if constexpr (P::PLANES == 2) {
      product.template add<false, BK, LDH, LDS>(tiles.in.h[1][0], tiles.in.small[0][0]);
      product.template add<false, BK, LDH, LDS>(tiles.in.h[0][0], tiles.in.small[1][0]);
    }
    product.template add<false, BK, LDH, LDS>(tiles.in.h[0][0], tiles.in.small[0][0]);
  }
  __syncthreads();
  product.store(tiles.term);
  __syncthreads();
  const Mask mask(seed, threshold, C);
  const int column = threadIdx.x % (BC / 8) * 8;
  const int64_t at = c0 + column;
  if (at >= C) return;
#pragma unroll 2
  for (int row = threadIdx.x / (BC / 8); row < BT && t0 + row < T; row += THREADS / (BC / 8)) {
    const int64_t t = t0 + row;
    Eight value, before{};
#pragma unroll
    for (int i = 0; i < 8; ++i) value.x[i] = scale * tiles.term[row][column + i];
    if (base.data) before = load_eight(base, t, at, C);
#pragma unroll
    for (int i = 0; i < 8; ++i) value.x[i] += mask_base ? before.x[i] : 0.0f;
    if (mask.drops) mask.drop(value, t, at);
#pragma unroll
    for (int i = 0; i < 8; ++i) value.x[i] += mask_base ? 0.0f : before.x[i];
    if (c)
#pragma unroll
      for (int i = 0; i < 8; ++i) value.x[i] *= at + i < C ? c[at + i] : 0.0f;
    if (extra.data) {
      const Eight more = load_eight(extra, t, at, C);
#pragma unroll
      for (int i = 0; i < 8; ++i) value.x[i] += more.x[i];
    }
    if (bias.data)
#pragma unroll
      for (int i = 0; i < 8; ++i) value.x[i] += at + i < C ? load(bias, at + i) : 0.0f;
    store_eight(out, t, at, C, value);
  }
}

}  // namespace dk

int dk_rank_update(dk_matrix base, dk_matrix h, dk_matrix small, const float *c, dk_matrix extra, dk_vector bias,
                   dk_matrix out, int64_t T, int64_t C, int64_t R, float scale, const int64_t *seed, int32_t threshold,
                   int32_t mask_base, void *stream) {
  using namespace dk;
  if (!is_rows(base) || !is_rows(h) || !is_rows(extra) || !is_rows(out)) return DK_BAD_STRIDE;
  if (h.dtype != small.dtype || (base.data && base.dtype != out.dtype) || (extra.data && extra.dtype != out.dtype) ||
      (bias.data && !known(bias.dtype)))
    return DK_BAD_DTYPE;
  return by_dtypes(out.dtype, h.dtype, [&](auto X, auto S) {
    using XT = decltype(X);
    using ST = decltype(S);
    return launch<Tiles<XT, ST>>(rank_update<XT, ST>, dim3(tiles(T, BT), tiles(C, BC)), stream, Rows<XT>(base),
                                 Strided<ST>(h), Strided<ST>(small), c, Rows<XT>(extra), bias, Rows<XT>(out), T, C, R,
                                 scale, seed, threshold, mask_base);
  });
}
