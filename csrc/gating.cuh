// A mixture's gating in rank space, for the tokens of a block: the end of the kernel that projects them
// (times_small.cu), or of the one that adds the parts of what was projected (route.cu); and what its gradient shares.
//
// Few lanes have a token together where experts are few, so that a warp has several tokens. Each lane has every so
// many-th expert; then all lanes of the warp go through the columns of its tokens. Sums over tokens are made by each
// group of lanes, then over the groups of a block; the caller adds the blocks'.

#pragma once

#include "device.cuh"

namespace dk {

constexpr int WARPS = THREADS / 32, MOST_EXPERTS = 512, FEW_EXPERTS = 32;
constexpr int TOKENS = 16;  // of a block that only gates
constexpr int NONE = 1 << 20;

inline bool fits(int64_t E, int64_t r) { return E >= 1 && E <= MOST_EXPERTS && r >= 0 && r <= (1 << 30) / E; }

// The lanes that have a token of at most MOST experts.
template <int MOST> struct Group {
  static constexpr int LANES = MOST <= FEW_EXPERTS ? 8 : 32, COUNT = THREADS / LANES, OF_WARP = 32 / LANES;
  const int lane = threadIdx.x % LANES, index = threadIdx.x / LANES;
};

// What each group has of its token's experts.
template <int MOST> using Numbers = float[Group<MOST>::COUNT][MOST];

// What gates h [T, (E r or r) + E + passed] to v [T, E r + passed] and w [T, E]; sums [blocks, 2 E + 1] of f, P and z.
struct Gating {
  dk_matrix h, v;
  const float *gates, *scale, *share;
  float *w, *sums;
  int64_t T, passed, top_k;
  int E, r;
  bool renormalize, shared;

  // Columns of h: of u, of the logits, all.
  __host__ __device__ int64_t width() const { return shared ? r : static_cast<int64_t>(E) * r; }
  __host__ __device__ int64_t logits() const { return gates ? 0 : E; }
  __host__ __device__ int64_t columns() const { return width() + logits() + passed; }

  int status() const {
    if (!known(h.dtype) || h.dtype != v.dtype) return DK_BAD_DTYPE;
    if (!is_rows(h) || !is_rows(v)) return DK_BAD_STRIDE;
    return T > 0 && !gates && !w ? DK_MISSING : DK_OK;
  }
};

struct Softmax {
  float top, total;
  __device__ __forceinline__ float power(float logit) const { return expf(logit - top); }
  __device__ __forceinline__ float lse() const { return top + logf(total); }
};

// Of a group's logits, of which a lane reads its own.
template <int MOST> __device__ __forceinline__ Softmax softmax_of(const float *logits, int E) {
  constexpr int LANES = Group<MOST>::LANES;
  const int lane = threadIdx.x % LANES;
  Softmax result{-INFINITY, 0};
  for (int e = lane; e < E; e += LANES) result.top = fmaxf(result.top, logits[e]);
  result.top = warp_max<LANES>(result.top);
  for (int e = lane; e < E; e += LANES) result.total += result.power(logits[e]);
  result.total = warp_sum<LANES>(result.total);
  return result;
}

// Sets chosen[e] to 1 for the k largest logits, the lowest index first among equals, and to 0 elsewhere. A lane reads
// and writes only its own experts. NaN is larger than nothing.
template <int MOST> __device__ __forceinline__ void choose(const float *logits, float *chosen, int E, int64_t k) {
  constexpr int LANES = Group<MOST>::LANES;
  const int lane = threadIdx.x % LANES;
  for (int e = lane; e < E; e += LANES) chosen[e] = k >= E;
  for (int64_t i = 0; k < E && i < k; ++i) {
    float best = 0;
    int at = NONE;
    for (int e = lane; e < E; e += LANES)
      if (chosen[e] == 0 && (logits[e] > best || (at == NONE && logits[e] == logits[e]))) best = logits[e], at = e;
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(~0u, best, lanes);
      const int other_at = __shfl_xor_sync(~0u, at, lanes);
      if (other_at != NONE && (at == NONE || other > best || (other == best && other_at < at)))
        best = other, at = other_at;
    }
    if (at != NONE && at % LANES == lane) chosen[at] = 1;
  }
}

// The weights of the tokens at hand, and what the groups have summed so far.
template <int MOST> struct Experts {
  Numbers<MOST> w, f, P;
  float z[Group<MOST>::COUNT];

  __device__ __forceinline__ void clear(int E) {
    const Group<MOST> group;
    for (int e = group.lane; e < E; e += group.LANES) f[group.index][e] = P[group.index][e] = 0;
    if (group.lane == 0) z[group.index] = 0;
  }

  // Gates a token for each group, from `first` on. take(t, i) is column i of token t of h, and is asked for once;
  // `logits`: room for those of this group's token.
  template <class Take>
  __device__ __forceinline__ void gate(const Gating &g, int64_t first, float *logits, Take take) {
    const Group<MOST> group;
    weigh(g, first + group.index, logits, take);
    __syncwarp();
    const int own = threadIdx.x / 32 * group.OF_WARP;
    for (int i = own; i < own + group.OF_WARP && first + i < g.T; ++i) spread(g, first + i, w[i], take);
    __syncwarp();
  }

  // The block's sums, of all its groups.
  __device__ __forceinline__ void write_sums(const Gating &g) const {
    __syncthreads();
    float *out = g.sums + static_cast<int64_t>(blockIdx.x) * (2 * g.E + 1);
    for (int i = threadIdx.x; i <= 2 * g.E; i += THREADS) {
      float sum = 0;
      for (int k = 0; k < Group<MOST>::COUNT; ++k) sum += i < g.E ? f[k][i] : i < 2 * g.E ? P[k][i - g.E] : z[k];
      out[i] = sum;
    }
  }

private:
  // w of a group's token, and its part of the sums; outside, all lanes take part in what they find together.
  template <class Take>
  __device__ __forceinline__ void weigh(const Gating &g, int64_t t, float *logits, Take take) {
    const Group<MOST> group;
    const bool inside = t < g.T;
    const float counted = !inside ? 0 : g.share ? g.share[t] : 1;
    float *own_w = w[group.index], *own_f = f[group.index], *own_P = P[group.index];
    if (g.gates) {
      for (int e = group.lane; e < g.E; e += group.LANES) {
        own_w[e] = inside ? g.gates[t * g.E + e] : 0;
        if (counted != 0) own_f[e] += own_w[e] != 0 ? counted : 0, own_P[e] += own_w[e] * counted;
      }
      return;
    }
    for (int e = group.lane; e < g.E; e += group.LANES) logits[e] = inside ? take(t, g.width() + e) : 0;
    const Softmax softmax = softmax_of<MOST>(logits, g.E);
    const bool is_nan = softmax.total != softmax.total;
    choose<MOST>(logits, own_w, g.E, g.top_k);
    float kept = 0;
    for (int e = group.lane; e < g.E; e += group.LANES) {
      if (is_nan) own_w[e] = 1;
      kept += own_w[e] != 0 ? softmax.power(logits[e]) : 0;
    }
    kept = warp_sum<Group<MOST>::LANES>(kept);
    for (int e = group.lane; e < g.E; e += group.LANES) {
      const float power = softmax.power(logits[e]), p = power / softmax.total;
      if (counted != 0) own_f[e] += own_w[e] != 0 ? counted : 0, own_P[e] += p * counted;
      own_w[e] = own_w[e] == 0 ? 0 : g.renormalize ? power / kept : p;
      if (inside) g.w[t * g.E + e] = own_w[e];
    }
    if (group.lane == 0 && counted != 0) z[group.index] += softmax.lse() * softmax.lse() * counted;
  }

  // v of a token, by a warp.
  template <class Take>
  __device__ __forceinline__ void spread(const Gating &g, int64_t t, const float *weights, Take take) {
    const int width = static_cast<int>(g.width());
    for (int i = threadIdx.x % 32; i < width; i += 32) {
      const float u = take(t, i);
      const int owner = i / g.r;
      for (int e = g.shared ? 0 : owner; e < (g.shared ? g.E : owner + 1); ++e) {
        const float factor = weights[e] * g.scale[e];
        store(g.v, t, g.shared ? static_cast<int64_t>(e) * g.r + i : i, weights[e] == 0 ? 0.0f : factor * u);
      }
    }
    for (int64_t i = threadIdx.x % 32; i < g.passed; i += 32)
      store(g.v, t, static_cast<int64_t>(g.E) * g.r + i, take(t, width + g.logits() + i));
  }
};

}  // namespace dk
