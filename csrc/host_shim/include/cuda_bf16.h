// __nv_bfloat16: the upper half of a float, rounded to nearest even; NaN stays NaN.

#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return {0x7FFF};
  bits += 0x7FFF + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}
