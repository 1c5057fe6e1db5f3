// The product by vpdpbusd.
#pragma once

#include "group8.h"

namespace bimos::group8 {

constexpr float kMost = 127;      // of the whole numbers
constexpr float kLeast = 1e-30F;  // below, all is next to nothing, and its inverse might not be finite

Functions avx512_functions();

}  // namespace bimos::group8
