// What kernels are made of: elements of three dtypes seen as floats, matrices, 16-byte accesses, dropout, warp sums.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include "launch.cuh"

namespace dk {

using half = __half;
using bf16 = __nv_bfloat16;

// A float in memory, whose products are made in tf32.
struct tf32 {
  float x;
};

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(tf32 x) { return x.x; }
__device__ __forceinline__ float wide(half x) { return __half2float(x); }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ tf32 narrow<tf32>(float x) { return {x}; }
template <> __device__ __forceinline__ half narrow<half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

// Element `i` of memory in a dtype known when the kernel runs: for operands that are not token-sized.
__device__ __forceinline__ float load(const void *data, int dtype, int64_t i) {
  if (dtype == DK_FLOAT32) return static_cast<const float *>(data)[i];
  if (dtype == DK_FLOAT16) return wide(static_cast<const half *>(data)[i]);
  return wide(static_cast<const bf16 *>(data)[i]);
}

__device__ __forceinline__ void store(void *data, int dtype, int64_t i, float value) {
  if (dtype == DK_FLOAT32) static_cast<float *>(data)[i] = value;
  else if (dtype == DK_FLOAT16) static_cast<half *>(data)[i] = narrow<half>(value);
  else static_cast<bf16 *>(data)[i] = narrow<bf16>(value);
}

__device__ __forceinline__ float load(const dk_vector &v, int64_t i) { return load(v.data, v.dtype, i * v.stride); }

__device__ __forceinline__ float load(const dk_matrix &m, int64_t i, int64_t j) {
  return load(m.data, m.dtype, i * m.row_stride + j * m.column_stride);
}

__device__ __forceinline__ void store(const dk_matrix &m, int64_t i, int64_t j, float value) {
  store(m.data, m.dtype, i * m.row_stride + j * m.column_stride, value);
}

// What is left of a number that is stored in a dtype.
__device__ __forceinline__ float rounded(int dtype, float x) {
  return dtype == DK_FLOAT32 ? x : dtype == DK_FLOAT16 ? wide(narrow<half>(x)) : wide(narrow<bf16>(x));
}

// sum_p parts[p][i] of parts with `size` elements each, in their order.
__device__ __forceinline__ float total(const float *parts, int64_t i, int64_t count, int64_t size) {
  float sum = 0;
#pragma unroll 1
  for (int64_t p = 0; p < count; p += 8, i += 8 * size) {
    float part[8];  // all on their way at once
#pragma unroll
    for (int j = 0; j < 8; ++j) part[j] = p + j < count ? parts[i + j * size] : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += part[j];
  }
  return sum;
}

// A small matrix of one type with any strides.
template <class T> struct Strided {
  const T *data;
  int64_t row, column;

  __host__ __device__ explicit Strided(const dk_matrix &m)
      : data(static_cast<const T *>(m.data)), row(m.row_stride), column(m.column_stride) {}
};

// A token-sized matrix of one type whose rows are contiguous; `aligned`: 16-byte accesses may start at any 16 bytes.
template <class T> struct Rows {
  T *data;
  int64_t stride;
  bool aligned;

  __host__ __device__ explicit Rows(const dk_matrix &m)
      : data(static_cast<T *>(m.data)), stride(m.row_stride) {
    aligned = (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride) * sizeof(T)) % 16 == 0;
  }
};

// A vector of floats as a matrix whose rows are all the same.
__host__ __device__ inline Rows<float> every_row(const float *vector) {
  return Rows<float>({const_cast<float *>(vector), 0, 1, DK_FLOAT32});
}

// Eight neighbours in a row, as floats, and in memory.
struct Eight {
  float x[8];
};

template <class T> struct alignas(16) Packed {
  T x[8];
};

// From an address that 16 divides.
template <class T> __device__ __forceinline__ Eight load_eight(const T *from) {
  const Packed<T> packed = *reinterpret_cast<const Packed<T> *>(from);
  Eight result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result.x[i] = wide(packed.x[i]);
  return result;
}

template <class T> __device__ __forceinline__ Eight load_eight(const Rows<T> &m, int64_t row, int64_t column,
                                                               int64_t columns) {
  const T *from = m.data + row * m.stride + column;
  if (m.aligned && column + 8 <= columns) return load_eight(from);
  Eight result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result.x[i] = column + i < columns ? wide(from[i]) : 0.0f;
  return result;
}

template <class T> __device__ __forceinline__ void store_eight(const Rows<T> &m, int64_t row, int64_t column,
                                                               int64_t columns, const Eight &value) {
  T *to = m.data + row * m.stride + column;
  if (m.aligned && column + 8 <= columns) {
    Packed<T> packed;
#pragma unroll
    for (int i = 0; i < 8; ++i) packed.x[i] = narrow<T>(value.x[i]);
    store_bytes<sizeof packed>(to, &packed);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < columns) to[i] = narrow<T>(value.x[i]);
  }
}

// splitmix64 (Steele, Lea, Flood, OOPSLA 2014), as in backends/dropout.py: the same seed gives the same
// mask on every backend.
__device__ __forceinline__ uint64_t hash(uint64_t index, uint64_t seed) {
  uint64_t z = (index + 1) * 0x9E3779B97F4A7C15u + seed;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// The mask of a matrix with `columns` columns; without a seed nothing drops.
struct Mask {
  uint64_t key, groups;
  int threshold;
  bool drops;

  __device__ __forceinline__ Mask(const int64_t *seed, int threshold_, int64_t columns)
      : key(0), groups((columns + 3) / 4), threshold(threshold_), drops(seed != nullptr) {
    if (drops) key = hash(0, static_cast<uint64_t>(*seed));
  }

  // Bit i: whether column 4 g + i of a row is kept.
  __device__ __forceinline__ unsigned keeps(int64_t row, int64_t group) const {
    uint64_t bits = hash(static_cast<uint64_t>(row) * groups + group, key);
    unsigned kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) kept |= static_cast<unsigned>(static_cast<int16_t>(bits >> (16 * i)) >= threshold) << i;
    return kept;
  }

  // Eight neighbours from a column that 4 divides.
  __device__ __forceinline__ void drop(Eight &value, int64_t row, int64_t column) const {
    unsigned kept = keeps(row, column / 4) | keeps(row, column / 4 + 1) << 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) value.x[i] *= static_cast<float>(kept >> i & 1);  // NaN and Inf show
  }
};

// The sum, or the largest, of a number over the lanes of a warp, or over each LANES of them, in every lane.
template <int LANES = 32> __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

template <int LANES = 32> __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// Calls f with a value of the type that a dtype stands for.
template <class F> int by_dtype(int dtype, F f) {
  if (dtype == DK_FLOAT32) return f(float{});
  if (dtype == DK_FLOAT16) return f(half{});
  if (dtype == DK_BFLOAT16) return f(bf16{});
  return DK_BAD_DTYPE;
}

// Calls f with values of the types of a token-sized operand and of the small one it meets: the same, or float.
template <class F> int by_dtypes(int big, int small, F f) {
  return by_dtype(big, [&](auto x) {
    if (small == big) return f(x, x);
    return small == DK_FLOAT32 ? f(x, float{}) : static_cast<int>(DK_BAD_DTYPE);
  });
}

// The same of operands that are multiplied, float ones in tf32 where the caller lets them.
template <class F> int by_dtypes(int big, int small, bool in_tf32, F f) {
  if (in_tf32 && big == DK_FLOAT32 && small == DK_FLOAT32) return f(tf32{}, tf32{});
  return by_dtypes(big, small, f);
}

inline bool known(int dtype) { return dtype == DK_FLOAT32 || dtype == DK_FLOAT16 || dtype == DK_BFLOAT16; }

// Whether a matrix is absent, or one of contiguous rows.
inline bool is_rows(const dk_matrix &m) { return m.data == nullptr || m.column_stride == 1; }

}  // namespace dk
