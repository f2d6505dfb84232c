// A mixture's gating where the sums of its projection are split, or h is there already; and the sums over tokens.

#include "gating.cuh"

namespace dk {

template <int MOST> struct Routed {
  Experts<MOST> experts;
  Numbers<MOST> logits;
};

// With parts of h [count, T, columns] h is their sum, and is written.
template <int MOST>
__global__ void __launch_bounds__(THREADS, 1) route(Gating g, const float *parts, int64_t count) {
  auto &[experts, logits] = shared_memory<Routed<MOST>>();
  const Group<MOST> group;
  const int64_t columns = g.columns(), first = static_cast<int64_t>(blockIdx.x) * TOKENS;
  experts.clear(g.E);
  for (int i = 0; i < TOKENS; i += group.COUNT)
    experts.gate(g, first + i, logits[group.index], [&](int64_t t, int64_t column) {
      if (!parts) return load(g.h, t, column);
      const float sum = rounded(g.h.dtype, total(parts, t * columns + column, count, g.T * columns));
      store(g.h, t, column, sum);
      return sum;
    });
  experts.write_sums(g);
}

// A warp has one of the columns of sums [blocks, columns]: the first E go to f, the next to P, the last to z.
__global__ void __launch_bounds__(THREADS, 1)
    route_totals(const float *sums, int64_t blocks, int64_t columns, int E, float over, float *f, float *P, float *z) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (i >= columns) return;
  const int64_t own = blocks > lane ? tiles(blocks - lane, 32) : 0;
  const float sum = warp_sum(total(sums, lane * columns + i, own, 32 * columns)) / over;
  if (lane == 0) (i < E ? f + i : i < 2 * E ? P + i - E : z)[0] = sum;
}

}  // namespace dk

int64_t dk_route_tokens(void) { return dk::TOKENS; }

int dk_route(const float *parts, int64_t count, dk_matrix h, const float *gates, const float *scale, const float *share,
             dk_matrix v, float *w, float *sums, int64_t T, int64_t E, int64_t r, int64_t passed, int64_t top_k,
             int32_t renormalize, int32_t shared, void *stream) {
  using namespace dk;
  if (!fits(E, r)) return DK_BAD_SIZE;
  const Gating g{h, v, gates, scale, share, w, sums, T, passed, top_k, static_cast<int>(E), static_cast<int>(r),
                 renormalize != 0, shared != 0};
  if (const int status = g.status()) return status;
  const dim3 grid(tiles(T, TOKENS));
  return E <= FEW_EXPERTS ? launch<Routed<FEW_EXPERTS>>(route<FEW_EXPERTS>, grid, stream, g, parts, count)
                          : launch<Routed<MOST_EXPERTS>>(route<MOST_EXPERTS>, grid, stream, g, parts, count);
}

int dk_route_totals(const float *sums, int64_t blocks, int64_t E, float over, float *f, float *P, float *z,
                    void *stream) {
  using namespace dk;
  if ((P != nullptr) != (z != nullptr) || !f) return DK_MISSING;
  const int64_t columns = P ? 2 * E + 1 : E;
  return launch<Empty>(route_totals, dim3(tiles(columns, WARPS)), stream, sums, blocks, columns, E, over, f, P, z);
}
