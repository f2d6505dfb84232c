// The gradient of a mixture's gating, from the parts of dv that the reads of dy left: dv is added where it is needed
// and never written. Blocks behind those of the tokens add up what else was left in parts.

#include "gating.cuh"

namespace dk {

constexpr int PRODUCTS = 512;  // of u and dv that a warp has at a time

template <int MOST> struct Gradients {
  Numbers<MOST> w, p, aligned, ds;  // of the token at hand; ds of all so far
  float products[WARPS][PRODUCTS];
};

// dv [parts, T, E r + passed] in a dtype, one part where that is not float32; its sum is rounded to h's.
struct Gradient {
  const void *data;
  int64_t parts, columns, size;
  int dtype, to;

  __device__ __forceinline__ float operator()(int64_t t, int64_t i) const {
    const int64_t at = t * columns + i;
    return rounded(to, parts == 1 ? load(data, dtype, at) : total(static_cast<const float *>(data), at, parts, size));
  }
};

// What else there is to add: dB and dy_sum, parts of N * R and of N numbers.
struct Rest {
  const float *product, *sums;
  int64_t parts, N, R;
  float *dB, *dy_sum;

  __host__ __device__ int64_t products() const { return product ? N * R : 0; }
  __host__ __device__ int64_t numbers() const { return products() + (sums ? N : 0); }

  __device__ __forceinline__ void add(int64_t i) const {
    if (i < products()) dB[i] = total(product, i, parts, N * R);
    else if (i < numbers()) dy_sum[i - products()] = total(sums, i - products(), parts, N);
  }
};

// What is given and wanted, as in delora_kernels.h.
struct Back {
  Gradient dv;
  dk_matrix h, dh;
  const float *w, *scale, *share, *dP, *dz;
  float *dgates, *dscale;
  int64_t T, passed;
  int E, r;
  bool given, renormalize, shared;

  __device__ __forceinline__ int64_t width() const { return shared ? r : static_cast<int64_t>(E) * r; }
};

// The gradient of the logits of p = softmax(logits), p * (dp - sum p * dp), of which inner = sum p * dp and then
// left = sum p * (dp - inner): twice, as in backends/eager/route.py.
__device__ __forceinline__ float softmax_backward(float p, float dp, float inner, float left) {
  return p * (dp - inner - left);
}

// dlogits of a group's token, or d gates, of how u and dv are aligned; p: room for its logits.
template <int MOST>
__device__ __forceinline__ void weights_backward(const Back &g, int64_t t, const float *w, const float *aligned,
                                                 float *p) {
  const Group<MOST> group;
  const bool inside = t < g.T;
  const float counted = !inside ? 0 : g.share ? g.share[t] : 1 / static_cast<float>(g.T);
  if (g.given) {
    for (int e = group.lane; e < g.E && inside; e += group.LANES)
      g.dgates[t * g.E + e] = aligned[e] * g.scale[e] + g.dP[e] * counted;
    return;
  }
  for (int e = group.lane; e < g.E; e += group.LANES) p[e] = inside ? load(g.h, t, g.width() + e) : 0;
  const Softmax softmax = softmax_of<MOST>(p, g.E);
  const auto dw = [&](int e) { return w[e] == 0 ? 0 : aligned[e] * g.scale[e]; };
  const auto kept = [&](int e) { return g.renormalize ? w[e] : p[e]; };
  float inner = 0, inner_P = 0, left = 0, left_P = 0;
  for (int e = group.lane; e < g.E; e += group.LANES) {
    p[e] = softmax.power(p[e]) / softmax.total;
    inner += kept(e) * dw(e);
    inner_P += p[e] * g.dP[e];
  }
  inner = warp_sum<Group<MOST>::LANES>(inner);
  inner_P = warp_sum<Group<MOST>::LANES>(inner_P);
  for (int e = group.lane; e < g.E; e += group.LANES) {
    left += kept(e) * (dw(e) - inner);
    left_P += p[e] * (g.dP[e] - inner_P);
  }
  left = warp_sum<Group<MOST>::LANES>(left);
  left_P = warp_sum<Group<MOST>::LANES>(left_P);
  for (int e = group.lane; e < g.E && inside; e += group.LANES) {
    const float task = kept(e) == 0 ? 0 : softmax_backward(kept(e), dw(e), inner, left);
    const float balance = softmax_backward(p[e], g.dP[e], inner_P, left_P);
    const float mean = counted == 0 ? 0 : (balance + 2 * g.dz[0] * softmax.lse() * p[e]) * counted;
    store(g.dh, t, g.width() + e, task + mean);
  }
}

template <int MOST> __global__ void __launch_bounds__(THREADS, 1) route_backward(Back g, Rest rest) {
  constexpr int LANES = Group<MOST>::LANES, OF_WARP = Group<MOST>::OF_WARP;
  auto &numbers = shared_memory<Gradients<MOST>>();
  const Group<MOST> group;
  const int64_t after = blockIdx.x - tiles(g.T, TOKENS);
  if (after >= 0) return rest.add(after * THREADS + threadIdx.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int experts = g.shared ? 1 : g.E, most = PRODUCTS / (OF_WARP * g.E);  // that have columns; of these at a time
  float *w = numbers.w[group.index], *aligned = numbers.aligned[group.index], *ds = numbers.ds[group.index];
  float *products = numbers.products[warp];
  for (int e = group.lane; e < g.E; e += LANES) ds[e] = 0;
  for (int i0 = 0; i0 < TOKENS; i0 += group.COUNT) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * TOKENS + i0, t = first + group.index;
    const int64_t own = first + warp * OF_WARP, last = own + OF_WARP < g.T ? own + OF_WARP : g.T;
    for (int e = group.lane; e < g.E; e += LANES) w[e] = t < g.T ? g.w[t * g.E + e] : 0, aligned[e] = 0;
    __syncwarp();
    for (int j0 = 0; j0 < g.r; j0 += most) {
      const int some = g.r - j0 < most ? g.r - j0 : most, columns = experts * some;
      for (int n = lane; n < (last - own) * columns; n += 32) {
        const int i = n / columns, owner = n % columns / some, j = n % some;
        const float *weights = numbers.w[warp * OF_WARP + i], u = load(g.h, own + i, owner * g.r + j0 + j);
        float du = 0;
        for (int e = owner; e < (g.shared ? g.E : owner + 1); ++e) {
          const float dv = g.dv(own + i, e * g.r + j0 + j);
          products[(i * g.E + e) * some + j] = u * dv;
          if (weights[e] != 0) du += weights[e] * g.scale[e] * dv;
        }
        store(g.dh, own + i, owner * g.r + j0 + j, du);
      }
      __syncwarp();
      for (int e = group.lane; e < g.E && t < g.T; e += LANES)
        for (int j = 0; j < some; ++j) aligned[e] += products[((t - own) * g.E + e) * some + j];
      __syncwarp();
    }
    for (int e = group.lane; e < g.E; e += LANES) ds[e] += w[e] == 0 ? 0 : w[e] * aligned[e];
    weights_backward<MOST>(g, t, w, aligned, numbers.p[group.index]);
    for (int64_t i = own; i < last; ++i)
      for (int64_t c = lane; c < g.passed; c += 32)
        store(g.dh, i, g.width() + (g.given ? 0 : g.E) + c, g.dv(i, static_cast<int64_t>(g.E) * g.r + c));
  }
  __syncthreads();
  for (int e = threadIdx.x; e < g.E && g.dscale; e += THREADS) {
    float sum = 0;
    for (int k = 0; k < group.COUNT; ++k) sum += numbers.ds[k][e];
    g.dscale[static_cast<int64_t>(blockIdx.x) * g.E + e] = sum;
  }
}

}  // namespace dk

int dk_route_backward(const void *dv, int64_t dv_parts, int32_t dv_dtype, dk_matrix h, const float *w,
                      const float *scale, const float *share, const float *dP, const float *dz, dk_matrix dh,
                      float *dgates, float *dscale, int64_t T, int64_t E, int64_t r, int64_t passed, int32_t given,
                      int32_t renormalize, int32_t shared, const float *product, const float *sums, int64_t parts,
                      float *dB, float *dy_sum, int64_t N, void *stream) {
  using namespace dk;
  if (!known(h.dtype) || h.dtype != dh.dtype || !known(dv_dtype) || (dv_parts > 1 && dv_dtype != DK_FLOAT32))
    return DK_BAD_DTYPE;
  if (!is_rows(h) || !is_rows(dh)) return DK_BAD_STRIDE;
  if (!fits(E, r)) return DK_BAD_SIZE;
  if ((T > 0 && given && !dgates) || (product && !dB) || (sums && !dy_sum)) return DK_MISSING;
  const int64_t columns = E * r + passed;
  const Back g{{dv, dv_parts, columns, T * columns, dv_dtype, h.dtype}, h, dh, w, scale, share, dP, dz, dgates, dscale,
               T, passed, static_cast<int>(E), static_cast<int>(r), given != 0, renormalize != 0, shared != 0};
  const Rest rest{product, sums, parts, N, columns, dB, dy_sum};
  const dim3 grid(tiles(T, TOKENS) + tiles(rest.numbers(), THREADS));
  return E <= FEW_EXPERTS ? launch<Gradients<FEW_EXPERTS>>(route_backward<FEW_EXPERTS>, grid, stream, g, rest)
                          : launch<Gradients<MOST_EXPERTS>>(route_backward<MOST_EXPERTS>, grid, stream, g, rest);
}
