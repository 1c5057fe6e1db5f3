// Single numbers, for loops that the compiler makes vectors of.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../targets.h"

namespace bimos::maths {

BIMOS_INLINE uint16_t to_bfloat16(float value) {  // to nearest even; NaN stays NaN
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// e^x to 2e-7 relative, as polynomials do (Cephes); 0 below -87, where float32 ends.
BIMOS_INLINE float exponential(float x) {
  const float clamped = x < -87.3F ? -87.3F : (x > 88.3F ? 88.3F : x);
  const float whole = std::floor(clamped * 1.44269504F + 0.5F);
  const float rest = clamped - whole * 0.693359375F + whole * 2.12194440e-4F;
  float sum = 1.9875691500e-4F;
  sum = sum * rest + 1.3981999507e-3F;
  sum = sum * rest + 8.3334519073e-3F;
  sum = sum * rest + 4.1665795894e-2F;
  sum = sum * rest + 1.6666665459e-1F;
  sum = sum * rest + 5.0000001201e-1F;
  sum = sum * rest * rest + rest + 1.0F;
  const float power = std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
  return x < -87.3F ? 0.0F : (x != x ? x : sum * power);
}

}  // namespace bimos::maths
