// Rows sorted by expert, cut into tiles of one expert's rows each. Offsets say where the rows of each expert end; those
// behind the last belong to nobody. Nobody waits for them: each block looks for its tile itself.

#pragma once

#include "device.cuh"

namespace dk {

// A tile: its expert (E: nobody's rows; above: there is no such tile), its first row, where the expert's rows end; and
// whether it is the expert's only one, or else its place among the tiles of all experts that have several.
struct Tile {
  int64_t expert, first, end, place;
  bool alone;
};

struct Groups {
  const void *offsets;
  bool in_64_bits;
  int64_t E, T;

  // The end of an expert's rows; of E: of those that are nobody's.
  __device__ __forceinline__ int64_t end(int64_t e) const {
    if (e < 0 || e >= E) return e < 0 ? 0 : T;
    const int64_t row = in_64_bits ? static_cast<const int64_t *>(offsets)[e] : static_cast<const int32_t *>(offsets)[e];
    return row < 0 ? 0 : row < T ? row : T;
  }

  // Tiles of `size` rows that expert e has, at least `least`.
  __device__ __forceinline__ int64_t count(int64_t e, int64_t size, int64_t least) const {
    const int64_t found = e <= E ? tiles(end(e) - end(e - 1), size) : 0, lowest = e < E ? least : 0;
    return found > lowest ? found : lowest;
  }

  // The tile-th tile of `size` rows: the experts' one after the other, then nobody's. All lanes of a warp ask at once.
  __device__ __forceinline__ Tile find(int64_t tile, int64_t size, int64_t least) const {
    const int lane = threadIdx.x % 32;
    int64_t places = 0;
#pragma unroll 1
    for (int64_t e0 = 0; e0 <= E; e0 += 32) {
      const int64_t here = count(e0 + lane, size, least), several = here > 1 ? here : 0;
      const int64_t upto = sum_upto(here), several_upto = sum_upto(several), all = __shfl_sync(~0u, upto, 31);
      if (tile < all) {
        const int who = static_cast<int>(warp_sum(upto <= tile ? 1.0f : 0.0f));
        const int64_t e = e0 + who, nth = tile - __shfl_sync(~0u, upto - here, who);
        const int64_t place = places + __shfl_sync(~0u, several_upto - several, who) + nth;
        return {e, end(e - 1) + nth * size, end(e), place, __shfl_sync(~0u, here, who) == 1};
      }
      tile -= all;
      places += __shfl_sync(~0u, several_upto, 31);
    }
    return {E + 1, 0, 0, 0, false};
  }

  // The place of an expert's first tile among those of experts with several, and how many it has (0: none or one).
  __device__ __forceinline__ Tile several(int64_t expert, int64_t size) const {
    int64_t before = 0;
#pragma unroll 1
    for (int64_t e0 = 0; e0 < expert; e0 += 32) {
      const int64_t e = e0 + threadIdx.x % 32, here = e < expert ? count(e, size, 1) : 0;
      before += __shfl_sync(~0u, sum_upto(here > 1 ? here : 0), 31);
    }
    const int64_t own = count(expert, size, 1);
    return {expert, 0, own > 1 ? own : 0, before, own == 1};
  }

private:
  // The sum over this lane and those before it.
  static __device__ __forceinline__ int64_t sum_upto(int64_t x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int64_t from = __shfl_sync(~0u, x, lane - d);
      if (lane >= d) x += from;
    }
    return x;
  }
};

// Each expert's small matrix: that of expert 0, and the elements between one's and the next one's.
template <class T> __device__ __forceinline__ Strided<T> of_expert(Strided<T> small, int64_t by_expert, int64_t e) {
  small.data += e * by_expert;
  return small;
}

}  // namespace dk
