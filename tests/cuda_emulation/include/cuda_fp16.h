#pragma once

#include <c10/util/Half.h>

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(c10::detail::fp16_ieee_from_fp32_value(x)) {}
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
