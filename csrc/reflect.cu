// ETHER's block reflections of every row of x [T, n D], and their gradients, in float32. With a = (x . u) / (u . u) and
// b = (dy . u) / (u . u) of each token and block, 0 where u is 0, and c = 2 (with v: c = 1):
//
//     x' = x - c a u [+ a_v v]         g = sum_t a dy + b x
//     dx = dy - c b u [+ b_v v]        du = -c (g - (g . u) / (u . u) u),   dv = g_v - (g_v . v) / (v . v) v
//
// As many neighbouring lanes as have eight features each share a token's block. What is read twice is in a cache.

#include "device.cuh"

namespace dk {

constexpr int TOKENS = 16, COLUMNS = 1024, MOST_BLOCKS = 64;  // of a step of reflect_backward

__device__ __forceinline__ float over(float dot, float square) { return square == 0 ? 0 : dot / square; }

// The sum over `lanes` neighbouring lanes, in each of them.
__device__ __forceinline__ float lanes_sum(float x, int lanes) {
  for (int by = lanes / 2; by > 0; by /= 2) x += __shfl_xor_sync(~0u, x, by);
  return x;
}

__device__ __forceinline__ float dot(const Eight &a, const Eight &b) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum += a.x[j] * b.x[j];
  return sum;
}

__device__ __forceinline__ void add(Eight &to, float factor, const Eight &x) {
#pragma unroll
  for (int j = 0; j < 8; ++j) to.x[j] += factor * x.x[j];
}

template <class X, class S>
__global__ void __launch_bounds__(THREADS, 1)
    reflect(Rows<X> x, Rows<S> u, Rows<S> v, dk_vector bias, Rows<X> out, int64_t T, int64_t n, int64_t D, int lanes) {
  const int64_t pair = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / lanes, t = pair / n, i = pair % n;
  const int64_t first = threadIdx.x % lanes * 8, begin = i * D, end = begin + D;
  float xu = 0, uu = 0, xv = 0, vv = 0;
  for (int64_t d = first; d < D && t < T; d += 8 * lanes) {
    const Eight here = load_eight(x, t, begin + d, end), along = load_eight(u, i, d, D);
    xu += dot(here, along), uu += dot(along, along);
    if (!v.data) continue;
    const Eight other = load_eight(v, i, d, D);
    xv += dot(here, other), vv += dot(other, other);
  }
  xu = (v.data ? -1 : -2) * over(lanes_sum(xu, lanes), lanes_sum(uu, lanes));
  xv = over(lanes_sum(xv, lanes), lanes_sum(vv, lanes));
  for (int64_t d = first; d < D && t < T; d += 8 * lanes) {
    Eight value = load_eight(x, t, begin + d, end);
    add(value, xu, load_eight(u, i, d, D));
    if (v.data) add(value, xv, load_eight(v, i, d, D));
    if (bias.data)
#pragma unroll
      for (int j = 0; j < 8; ++j) value.x[j] += d + j < D ? load(bias, begin + d + j) : 0.0f;
    store_eight(out, t, begin + d, end, value);
  }
}

struct Coefficients {
  float a_u[TOKENS * MOST_BLOCKS], b_u[TOKENS * MOST_BLOCKS], a_v[TOKENS * MOST_BLOCKS], b_v[TOKENS * MOST_BLOCKS];
};

// A block of threads has `across` blocks of features and a part of the tokens; g [parts, 1 or 2, n D].
template <class X, class S>
__global__ void __launch_bounds__(THREADS, 1)
    reflect_backward(Rows<X> dy, Rows<X> x, Rows<S> u, Rows<S> v, Rows<X> dx, Rows<float> g, int64_t T, int64_t n,
                     int64_t D, int64_t part, int across, int lanes) {
  auto &of = shared_memory<Coefficients>();
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * across, first = blockIdx.y * part;
  const int64_t last = first + part < T ? first + part : T, row = static_cast<int64_t>(blockIdx.y) * (v.data ? 2 : 1);
  const int blocks = n - i0 < across ? static_cast<int>(n - i0) : across, eights = static_cast<int>(tiles(D, 8));
  const int group = threadIdx.x / lanes, groups = THREADS / lanes;
  const float c = v.data ? -1 : -2;
  int64_t t0 = first;
  do {
    for (int from = 0; from < TOKENS * blocks; from += groups) {
      const int pair = from + group;
      const int64_t i = i0 + pair / TOKENS, t = t0 + pair % TOKENS;
      const bool here = pair < TOKENS * blocks && t < last;
      float xu = 0, yu = 0, uu = 0, xv = 0, yv = 0, vv = 0;
      for (int64_t d = threadIdx.x % lanes * 8; d < D && here; d += 8 * lanes) {
        const Eight left = load_eight(x, t, i * D + d, i * D + D), right = load_eight(dy, t, i * D + d, i * D + D);
        const Eight along = load_eight(u, i, d, D);
        xu += dot(left, along), yu += dot(right, along), uu += dot(along, along);
        if (!v.data) continue;
        const Eight other = load_eight(v, i, d, D);
        xv += dot(left, other), yv += dot(right, other), vv += dot(other, other);
      }
      xu = lanes_sum(xu, lanes), yu = lanes_sum(yu, lanes), uu = lanes_sum(uu, lanes);
      xv = lanes_sum(xv, lanes), yv = lanes_sum(yv, lanes), vv = lanes_sum(vv, lanes);
      if (here && threadIdx.x % lanes == 0) {
        of.a_u[pair] = over(xu, uu), of.b_u[pair] = over(yu, uu);
        of.a_v[pair] = over(xv, vv), of.b_v[pair] = over(yv, vv);
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < blocks * eights; e += THREADS) {
      const int64_t i = i0 + e / eights, d = e % eights * 8, begin = i * D + d, end = i * D + D;
      const Eight along = load_eight(u, i, d, D), other = v.data ? load_eight(v, i, d, D) : Eight{};
      Eight g_u{}, g_v{};
      if (t0 > first) {
        g_u = load_eight(g, row, begin, end);
        if (v.data) g_v = load_eight(g, row + 1, begin, end);
      }
#pragma unroll 2
      for (int k = 0; k < TOKENS && t0 + k < last; ++k) {
        const int pair = e / eights * TOKENS + k;
        const Eight left = load_eight(x, t0 + k, begin, end);
        Eight right = load_eight(dy, t0 + k, begin, end);
        add(g_u, of.a_u[pair], right), add(g_u, of.b_u[pair], left);
        if (v.data) add(g_v, of.a_v[pair], right), add(g_v, of.b_v[pair], left);
        if (!dx.data) continue;
        add(right, c * of.b_u[pair], along);
        if (v.data) add(right, of.b_v[pair], other);
        store_eight(dx, t0 + k, begin, end, right);
      }
      store_eight(g, row, begin, end, g_u);
      if (v.data) store_eight(g, row + 1, begin, end, g_v);
    }
    __syncthreads();
    t0 += TOKENS;
  } while (t0 < last);
}

struct WarpSums {
  float dots[THREADS / 32], squares[THREADS / 32];
};

// du of block i, and dv in the blocks after the n-th: g without its part along the vector.
__global__ void __launch_bounds__(THREADS, 1)
    reflect_across(const float *g, dk_matrix u, dk_matrix v, float *du, float *dv, int64_t n, int64_t D) {
  auto &warps = shared_memory<WarpSums>();
  const bool is_v = blockIdx.x >= n;
  const int64_t i = is_v ? blockIdx.x - n : blockIdx.x;
  const dk_matrix vector{is_v ? v.data : u.data, is_v ? v.row_stride : u.row_stride, 1, u.dtype};
  const float *from = g + blockIdx.x * D;
  float *to = (is_v ? dv : du) + i * D;
  float gu = 0, uu = 0;
  for (int64_t d = threadIdx.x; d < D; d += THREADS) {
    const float value = load(vector, i, d);
    gu += from[d] * value, uu += value * value;
  }
  gu = warp_sum(gu), uu = warp_sum(uu);
  if (threadIdx.x % 32 == 0) warps.dots[threadIdx.x / 32] = gu, warps.squares[threadIdx.x / 32] = uu;
  __syncthreads();
  gu = uu = 0;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) gu += warps.dots[w], uu += warps.squares[w];
  const float along = over(gu, uu), sign = is_v ? 1 : v.data ? -1 : -2;
  for (int64_t d = threadIdx.x; d < D; d += THREADS) to[d] = sign * (from[d] - along * load(vector, i, d));
}

// Lanes that share D features: a power of two, at most a warp.
inline int lanes_of(int64_t D) {
  int lanes = 1;
  while (lanes < 32 && 8 * lanes < D) lanes *= 2;
  return lanes;
}

// A matrix whose blocks of D columns are read in eights.
template <class T> Rows<T> blocks_of(const dk_matrix &m, int64_t D) {
  Rows<T> rows(m);
  rows.aligned = rows.aligned && D * sizeof(T) % 16 == 0;
  return rows;
}

}  // namespace dk

int dk_reflect(dk_matrix x, dk_matrix u, dk_matrix v, dk_vector bias, dk_matrix out, int64_t T, int64_t n, int64_t D,
               void *stream) {
  using namespace dk;
  if (!is_rows(x) || !is_rows(u) || !is_rows(v) || !is_rows(out)) return DK_BAD_STRIDE;
  if (x.dtype != out.dtype || (v.data && v.dtype != u.dtype) || (bias.data && !known(bias.dtype))) return DK_BAD_DTYPE;
  return by_dtypes(x.dtype, u.dtype, [&](auto X, auto S) {
    using XT = decltype(X);
    using ST = decltype(S);
    const int lanes = lanes_of(D);
    return launch<Empty>(reflect<XT, ST>, dim3(tiles(T * n * lanes, THREADS)), stream, blocks_of<XT>(x, D),
                         blocks_of<ST>(u, D), blocks_of<ST>(v, D), bias, blocks_of<XT>(out, D), T, n, D, lanes);
  });
}

int dk_reflect_backward(dk_matrix dy, dk_matrix x, dk_matrix u, dk_matrix v, dk_matrix dx, float *g, int64_t T,
                        int64_t n, int64_t D, int64_t parts, void *stream) {
  using namespace dk;
  if (!is_rows(dy) || !is_rows(x) || !is_rows(u) || !is_rows(v) || !is_rows(dx)) return DK_BAD_STRIDE;
  if (parts < 1 || parts > 65535) return DK_BAD_SIZE;
  if (dy.dtype != x.dtype || (dx.data && dx.dtype != x.dtype) || (v.data && v.dtype != u.dtype)) return DK_BAD_DTYPE;
  return by_dtypes(x.dtype, u.dtype, [&](auto X, auto S) {
    using XT = decltype(X);
    using ST = decltype(S);
    const int64_t fit = D < COLUMNS ? COLUMNS / D : 1, across = fit < MOST_BLOCKS ? fit : MOST_BLOCKS;
    const dk_matrix sums{g, n * D, 1, DK_FLOAT32};
    return launch<Coefficients>(reflect_backward<XT, ST>, dim3(tiles(n, across), parts), stream, blocks_of<XT>(dy, D),
                                blocks_of<XT>(x, D), blocks_of<ST>(u, D), blocks_of<ST>(v, D), blocks_of<XT>(dx, D),
                                blocks_of<float>(sums, D), T, n, D, tiles(tiles(T, TOKENS), parts) * TOKENS,
                                static_cast<int>(across), lanes_of(D));
  });
}

int dk_reflect_across(const float *g, dk_matrix u, dk_matrix v, float *du, float *dv, int64_t n, int64_t D,
                      void *stream) {
  using namespace dk;
  if (!is_rows(u) || !is_rows(v)) return DK_BAD_STRIDE;
  if (!known(u.dtype) || (v.data && v.dtype != u.dtype)) return DK_BAD_DTYPE;
  if (v.data && !dv) return DK_MISSING;
  return launch<WarpSums>(reflect_across, dim3(v.data ? 2 * n : n), stream, g, u, v, du, dv, n, D);
}
