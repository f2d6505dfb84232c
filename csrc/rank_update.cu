// The rank-R term beside a library GEMM, in one pass over its output, rounded once:
//
//     out = c * (drop(base) + scale * drop(h small)) + extra + bias
//
// Form (b) updates what the GEMM wrote (out is base); form (d) has no base yet and writes what the GEMM then adds to.
// A block has a tile of 64 tokens and 64 columns, whose base is on its way while h and small are multiplied; a thread
// finishes eight neighbours at a time, in 16-byte accesses. Of rows sorted by expert, a block has 64 of one expert's.

#include "groups.cuh"
#include "product.cuh"

namespace dk {

constexpr int BT = 64, BC = 64, BK = 16;

// How h and `small` of type S meet for a result of type X: float factors of a bfloat16 result become two planes each,
// whose three products sum up to what matters of a float's bits.
template <class X, class S> struct Pair : Meeting<X, S> {
  static constexpr int PLANES = sizeof(S) == 4 && sizeof(typename Meeting<X, S>::Small) == 2 ? 2 : 1;
};

template <class X, class S> struct Tiles {
  using P = Pair<X, S>;
  union {
    struct {
      alignas(128) typename P::Small h[2][P::PLANES][BT][BK + PAD<typename P::Small>];
      alignas(128) typename P::Small small[2][P::PLANES][BK][BC + PAD<typename P::Small>];
    } in;
    alignas(128) float term[BT][BC + 4];
  } of;
  alignas(16) X base[ASYNC ? BT : 1][BC + PAD<X>];  // where copies are not asynchronous, base is read at the end
};

// The tile of rows t0 ... T - 1, 64 at most.
template <class X, class S>
__device__ __forceinline__ void update(const Rows<X> &base, const Strided<S> &h, const Strided<S> &small,
                                       const Rows<float> &c, const Rows<X> &extra, const dk_vector &bias,
                                       const Rows<X> &out, int64_t t0, int64_t T, int64_t C, int64_t R, float scale,
                                       const int64_t *seed, int threshold, bool mask_base) {
  using P = Pair<X, S>;
  constexpr int LDH = BK + PAD<typename P::Small>, LDS = BC + PAD<typename P::Small>;
  auto &tiles = shared_memory<Tiles<X, S>>();
  auto &in = tiles.of.in;
  const int64_t c0 = static_cast<int64_t>(blockIdx.y) * BC;
  if constexpr (ASYNC)
    if (base.data) start_tile<BT, BC>(tiles.base, base, t0, c0, T, C);
  typename P::template Product<BT / 16, BC / 16> product;
  SmallTile<S, BT, BK> left;
  SmallTile<S, BK, BC> right;
  product.clear();
  left.load(h, t0, 0, T, R);
  right.load(small, 0, c0, R, C);
  left.template store<P::PLANES>(h, in.h[0]);
  right.template store<P::PLANES>(small, in.small[0]);
  int side = 0;
  for (int64_t r = BK; r < R + BK; r += BK, side ^= 1) {  // of the next step
    __syncthreads();
    if (r < R) {
      left.load(h, t0, r, T, R);
      right.load(small, r, c0, R, C);
    }
    if constexpr (P::PLANES == 2) {
      product.template add<false, BK, LDH, LDS>(in.h[side][1][0], in.small[side][0][0]);
      product.template add<false, BK, LDH, LDS>(in.h[side][0][0], in.small[side][1][0]);
    }
    product.template add<false, BK, LDH, LDS>(in.h[side][0][0], in.small[side][0][0]);
    if (r < R) {
      left.template store<P::PLANES>(h, in.h[side ^ 1]);
      right.template store<P::PLANES>(small, in.small[side ^ 1]);
    }
  }
  __syncthreads();
  product.store(tiles.of.term);
  const Mask mask(seed, threshold, C);
  const int column = threadIdx.x % (BC / 8) * 8;
  const int64_t at = c0 + column;
  Eight factor{}, shift{};  // of all this thread's rows
  if (c.data) factor = load_eight(c, 0, at, C);
  if (bias.data)
#pragma unroll
    for (int i = 0; i < 8; ++i) shift.x[i] = at + i < C ? load(bias, at + i) : 0.0f;
  __pipeline_wait_prior(0);
  __syncthreads();
  if (at >= C) return;
  const auto add = [](Eight &to, const Eight &x) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to.x[i] += x.x[i];
  };
#pragma unroll 2
  for (int row = threadIdx.x / (BC / 8); row < BT && t0 + row < T; row += THREADS / (BC / 8)) {
    const int64_t t = t0 + row;
    Eight value = load_eight(&tiles.of.term[row][column]), before;
    if (base.data) before = ASYNC ? load_eight(&tiles.base[ASYNC ? row : 0][column]) : load_eight(base, t, at, C);
#pragma unroll
    for (int i = 0; i < 8; ++i) value.x[i] *= scale;
    if (base.data && mask_base) add(value, before);
    if (mask.drops) mask.drop(value, t, at);
    if (base.data && !mask_base) add(value, before);
    if (c.data)
#pragma unroll
      for (int i = 0; i < 8; ++i) value.x[i] *= factor.x[i];
    if (extra.data) add(value, load_eight(extra, t, at, C));
    if (bias.data) add(value, shift);
    store_eight(out, t, at, C, value);
  }
}

template <class X, class S>
__global__ void __launch_bounds__(THREADS, 4)
    rank_update(Rows<X> base, Strided<S> h, Strided<S> small, Rows<float> c, Rows<X> extra, dk_vector bias,
                Rows<X> out, int64_t T, int64_t C, int64_t R, float scale, const int64_t *seed, int threshold,
                bool mask_base) {
  update<X, S>(base, h, small, c, extra, bias, out, static_cast<int64_t>(blockIdx.x) * BT, T, C, R, scale, seed,
               threshold, mask_base);
}

// Rows that are nobody's have no base, no term, no bias: they become 0.
template <class X, class S>
__global__ void __launch_bounds__(THREADS, 4)
    grouped_update(Rows<X> out, Strided<S> h, Strided<S> small, int64_t by_expert, dk_matrix bias, Groups groups,
                   int64_t C, int64_t R, float scale, const int64_t *seed, int threshold) {
  const Tile tile = groups.find(blockIdx.x, BT, 0);
  if (tile.first >= tile.end) return;
  const bool somebodys = tile.expert < groups.E;
  Rows<X> base = out;
  dk_vector own{nullptr, 1, bias.dtype};
  if (!somebodys) base.data = nullptr;
  if (somebodys && bias.data)
    own.data = static_cast<char *>(bias.data) + tile.expert * bias.row_stride * (bias.dtype == DK_FLOAT32 ? 4 : 2);
  update<X, S>(base, h, of_expert(small, by_expert, somebodys ? tile.expert : 0), every_row(nullptr),
               Rows<X>(dk_matrix{}), own, out, tile.first, tile.end, C, somebodys ? R : 0, scale, seed, threshold,
               false);
}

}  // namespace dk

int dk_rank_update(dk_matrix base, dk_matrix h, dk_matrix small, const float *c, dk_matrix extra, dk_vector bias,
                   dk_matrix out, int64_t T, int64_t C, int64_t R, float scale, const int64_t *seed, int32_t threshold,
                   int32_t mask_base, int32_t in_tf32, void *stream) {
  using namespace dk;
  if (!is_rows(base) || !is_rows(h) || !is_rows(extra) || !is_rows(out)) return DK_BAD_STRIDE;
  if (h.dtype != small.dtype || (base.data && base.dtype != out.dtype) || (extra.data && extra.dtype != out.dtype) ||
      (bias.data && !known(bias.dtype)))
    return DK_BAD_DTYPE;
  return by_dtypes(out.dtype, h.dtype, in_tf32, [&](auto X, auto S) {
    using XT = decltype(X);
    using ST = decltype(S);
    return launch<Tiles<XT, ST>>(rank_update<XT, ST>, dim3(tiles(T, BT), tiles(C, BC)), stream, Rows<XT>(base),
                                 Strided<ST>(h), Strided<ST>(small), every_row(c), Rows<XT>(extra), bias, Rows<XT>(out),
                                 T, C, R, scale, seed, threshold, mask_base);
  });
}

int dk_grouped_update(dk_matrix out, dk_matrix h, dk_matrix small, int64_t by_expert, dk_matrix bias,
                      const void *offsets, int32_t in_64_bits, int64_t T, int64_t C, int64_t R, int64_t E, float scale,
                      const int64_t *seed, int32_t threshold, int32_t in_tf32, void *stream) {
  using namespace dk;
  if (!is_rows(out) || !is_rows(h) || !is_rows(bias)) return DK_BAD_STRIDE;
  if (h.dtype != small.dtype || (bias.data && !known(bias.dtype))) return DK_BAD_DTYPE;
  if (T == 0) return DK_OK;
  return by_dtypes(out.dtype, h.dtype, in_tf32, [&](auto X, auto S) {
    using XT = decltype(X);
    using ST = decltype(S);
    const int64_t most = (T + (E + 1) * (BT - 1)) / BT;
    return launch<Tiles<XT, ST>>(grouped_update<XT, ST>, dim3(most, tiles(C, BC)), stream, Rows<XT>(out),
                                 Strided<ST>(h), Strided<ST>(small), by_expert, bias,
                                 Groups{offsets, in_64_bits != 0, E, T}, C, R, scale, seed, threshold);
  });
}
