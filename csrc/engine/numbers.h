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

}  // namespace bimos::maths
