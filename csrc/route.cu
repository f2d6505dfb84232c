// A mixture's gating and its gradient in rank space: a warp for each token, its experts in shared memory.
//
// A block has TOKENS tokens and sums what is summed over tokens, warp by warp and then over its warps; the caller adds
// the blocks' parts.

#include "device.cuh"

namespace dk {

constexpr int TOKENS = 32, WARPS = THREADS / 32, MOST_EXPERTS = 512;
constexpr int NONE = 1 << 20;

struct Experts {
  float logits[WARPS][MOST_EXPERTS], w[WARPS][MOST_EXPERTS];  // of the token at hand
  float sums[2][WARPS][MOST_EXPERTS];
  float z[WARPS];
};

struct Softmax {
  float top, total;
  __device__ __forceinline__ float power(float logit) const { return expf(logit - top); }
};

// Of a warp's logits, which are in shared memory afterwards.
__device__ __forceinline__ Softmax softmax_of(const dk_matrix &h, int64_t t, int64_t first, int E, float *logits) {
  Softmax result{-INFINITY, 0};
  for (int e = threadIdx.x % 32; e < E; e += 32) {
    logits[e] = load(h, t, first + e);
    result.top = fmaxf(result.top, logits[e]);
  }
  result.top = warp_max(result.top);
  for (int e = threadIdx.x % 32; e < E; e += 32) result.total += result.power(logits[e]);
  result.total = warp_sum(result.total);
  return result;
}

// Sets chosen[e] to 1 for the k largest logits, the lowest index first among equals, and to 0 elsewhere. A lane reads
// and writes only its own experts. NaN is larger than nothing.
__device__ __forceinline__ void choose(const float *logits, float *chosen, int E, int64_t k) {
  const int lane = threadIdx.x % 32;
  for (int e = lane; e < E; e += 32) chosen[e] = k >= E;
  for (int64_t i = 0; k < E && i < k; ++i) {
    float best = 0;
    int at = NONE;
    for (int e = lane; e < E; e += 32)
      if (chosen[e] == 0 && (logits[e] > best || (at == NONE && logits[e] == logits[e]))) best = logits[e], at = e;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(~0u, best, lanes);
      const int other_at = __shfl_xor_sync(~0u, at, lanes);
      if (other_at != NONE && (at == NONE || other > best || (other == best && other_at < at)))
        best = other, at = other_at;
    }
    if (at != NONE && at % 32 == lane) chosen[at] = 1;
  }
}

__global__ void __launch_bounds__(THREADS, 1)
    route(dk_matrix h, const float *gates, const float *scale, const float *share, dk_matrix v, float *w_out,
          float *f_out, float *P_out, float *z_out, int64_t T, int E, int r, int64_t passed, int64_t top_k,
          bool renormalize, bool shared) {
  auto &experts = shared_memory<Experts>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *logits = experts.logits[warp], *w = experts.w[warp];
  float *f = experts.sums[0][warp], *P = experts.sums[1][warp], z = 0;
  const int64_t width = shared ? r : static_cast<int64_t>(E) * r, first = static_cast<int64_t>(blockIdx.x) * TOKENS;
  for (int e = lane; e < E; e += 32) f[e] = P[e] = 0;
  for (int64_t t = first + warp; t < T && t < first + TOKENS; t += WARPS) {
    const float counted = share ? share[t] : 1;
    if (gates) {
      for (int e = lane; e < E; e += 32) {
        w[e] = gates[t * E + e];
        if (counted != 0) f[e] += w[e] != 0 ? counted : 0, P[e] += w[e] * counted;
      }
    } else {
      const Softmax softmax = softmax_of(h, t, width, E, logits);
      const bool is_nan = softmax.total != softmax.total;
      choose(logits, w, E, top_k);
      float kept = 0;
      for (int e = lane; e < E; e += 32) {
        if (is_nan) w[e] = 1;
        kept += w[e] != 0 ? softmax.power(logits[e]) : 0;
      }
      kept = warp_sum(kept);
      for (int e = lane; e < E; e += 32) {
        const float power = softmax.power(logits[e]), p = power / softmax.total;
        if (counted != 0) f[e] += w[e] != 0 ? counted : 0, P[e] += p * counted;
        w[e] = w[e] == 0 ? 0 : renormalize ? power / kept : p;
        w_out[t * E + e] = w[e];
      }
      const float lse = softmax.top + logf(softmax.total);
      if (counted != 0) z += lse * lse * counted;
    }
    __syncwarp();
    for (int i = lane; i < E * r; i += 32) {
      const int e = i / r;
      const float factor = w[e] * scale[e];
      store(v, t, i, w[e] == 0 ? 0.0f : factor * load(h, t, shared ? i % r : i));
    }
    for (int64_t i = lane; i < passed; i += 32)
      store(v, t, static_cast<int64_t>(E) * r + i, load(h, t, width + (gates ? 0 : E) + i));
    __syncwarp();
  }
  if (lane == 0) experts.z[warp] = z;
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += THREADS) {
    float f_sum = 0, P_sum = 0;
    for (int k = 0; k < WARPS; ++k) f_sum += experts.sums[0][k][e], P_sum += experts.sums[1][k][e];
    f_out[static_cast<int64_t>(blockIdx.x) * E + e] = f_sum;
    P_out[static_cast<int64_t>(blockIdx.x) * E + e] = P_sum;
  }
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int k = 0; k < WARPS; ++k) sum += experts.z[k];
    z_out[blockIdx.x] = sum;
  }
}

// The gradient of the logits of p = softmax(logits), where inner = sum p * dp.
__device__ __forceinline__ float softmax_backward(float p, float dp, float inner) { return p * (dp - inner); }

__global__ void __launch_bounds__(THREADS, 1)
    route_backward(dk_matrix dv, dk_matrix h, const float *w_in, const float *scale, const float *share,
                   const float *dP, const float *dz, dk_matrix dh, float *dgates, float *dscale, int64_t T, int E,
                   int r, int64_t passed, bool given, bool renormalize, bool shared) {
  auto &experts = shared_memory<Experts>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *logits = experts.logits[warp], *w = experts.w[warp];
  float *aligned = experts.sums[0][warp], *ds = experts.sums[1][warp];
  const int64_t width = shared ? r : static_cast<int64_t>(E) * r, first = static_cast<int64_t>(blockIdx.x) * TOKENS;
  for (int e = lane; e < E; e += 32) ds[e] = 0;
  for (int64_t t = first + warp; t < T && t < first + TOKENS; t += WARPS) {
    const float counted = share ? share[t] : 1 / static_cast<float>(T);
    for (int e = lane; e < E; e += 32) {
      w[e] = w_in[t * E + e];
      float sum = 0;
      for (int j = 0; j < r; ++j) sum += load(h, t, (shared ? 0 : e * r) + j) * load(dv, t, e * r + j);
      aligned[e] = sum;
      if (w[e] != 0) ds[e] += w[e] * sum;
    }
    __syncwarp();
    for (int i = lane; i < width; i += 32) {
      float du = 0;
      for (int e = shared ? 0 : i / r; e < (shared ? E : i / r + 1); ++e)
        if (w[e] != 0) du += w[e] * scale[e] * load(dv, t, shared ? e * r + i : i);
      store(dh, t, i, du);
    }
    if (given) {
      for (int e = lane; e < E; e += 32) dgates[t * E + e] = aligned[e] * scale[e] + dP[e] * counted;
    } else {
      const Softmax softmax = softmax_of(h, t, width, E, logits);
      const float lse = softmax.top + logf(softmax.total);
      float inner = 0, inner_P = 0;
      for (int e = lane; e < E; e += 32) {
        const float p = softmax.power(logits[e]) / softmax.total, dw = w[e] == 0 ? 0 : aligned[e] * scale[e];
        inner += (renormalize ? w[e] : p) * dw;
        inner_P += p * dP[e];
      }
      inner = warp_sum(inner);
      inner_P = warp_sum(inner_P);
      for (int e = lane; e < E; e += 32) {
        const float p = softmax.power(logits[e]) / softmax.total, dw = w[e] == 0 ? 0 : aligned[e] * scale[e];
        const float kept = renormalize ? w[e] : p;
        const float task = kept == 0 ? 0 : softmax_backward(kept, dw, inner);
        const float mean = counted == 0 ? 0 : (softmax_backward(p, dP[e], inner_P) + 2 * dz[0] * lse * p) * counted;
        store(dh, t, width + e, task + mean);
      }
    }
    for (int64_t i = lane; i < passed; i += 32)
      store(dh, t, width + (given ? 0 : E) + i, load(dv, t, static_cast<int64_t>(E) * r + i));
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += THREADS) {
    float sum = 0;
    for (int k = 0; k < WARPS; ++k) sum += experts.sums[1][k][e];
    dscale[static_cast<int64_t>(blockIdx.x) * E + e] = sum;
  }
}

}  // namespace dk

int64_t dk_route_tokens(int64_t) { return dk::TOKENS; }

int dk_route(dk_matrix h, const float *gates, const float *scale, const float *share, dk_matrix v, float *w, float *f,
             float *P, float *z, int64_t T, int64_t E, int64_t r, int64_t passed, int64_t top_k, int32_t renormalize,
             int32_t shared, void *stream) {
  using namespace dk;
  if (!known(h.dtype) || h.dtype != v.dtype) return DK_BAD_DTYPE;
  if (E < 1 || E > MOST_EXPERTS || E * r > 1 << 30) return DK_BAD_SIZE;
  if (!gates && !w) return DK_MISSING;
  return launch<Experts>(route, dim3(tiles(T, TOKENS)), stream, h, gates, scale, share, v, w, f, P, z, T, E, r, passed,
                         top_k, renormalize, shared);
}

int dk_route_backward(dk_matrix dv, dk_matrix h, const float *w, const float *scale, const float *share,
                      const float *dP, const float *dz, dk_matrix dh, float *dgates, float *dscale, int64_t T,
                      int64_t E, int64_t r, int64_t passed, int32_t given, int32_t renormalize, int32_t shared,
                      void *stream) {
  using namespace dk;
  if (!known(h.dtype) || h.dtype != dh.dtype || h.dtype != dv.dtype) return DK_BAD_DTYPE;
  if (E < 1 || E > MOST_EXPERTS || E * r > 1 << 30) return DK_BAD_SIZE;
  if (given && !dgates) return DK_MISSING;
  return launch<Experts>(route_backward, dim3(tiles(T, TOKENS)), stream, dv, h, w, scale, share, dP, dz, dh, dgates,
                         dscale, T, E, r, passed, given, renormalize, shared);
}
