// What is remembered of a head.
#pragma once

#include <cstdint>

namespace bimos::maths {

// Keys or values of a head, [position, n]: bfloat16, or int8 with a scale for every position.
struct Cache {
  uint16_t* halves;  // null where they are int8
  int8_t* bytes;
  float* scale;
};

}  // namespace bimos::maths
