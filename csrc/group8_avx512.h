// The product by vpdpbusd.
#pragma once

#include "group8.h"

namespace bimos::group8 {

Functions avx512_functions();

}  // namespace bimos::group8
