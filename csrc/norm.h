// Root-mean-square norm of rows, forward and backward, for training (bimos/training/fused.py).
#pragma once

#include <cstdint>

#include "targets.h"

namespace bimos::norm {

struct Rows {
  bool is_float;         // values are float32; else bfloat16
  int64_t n;
  const void *x, *grad;  // [rows, n]; the gradient in backward only
  const float* weight;   // [n]
  void* out;             // [rows, n]: x * inverse * weight, or the gradient of x
  float* inverse;        // [rows]: 1 / sqrt(mean x^2 + epsilon); written in forward
  float* of_weight;      // [n], added to in backward
  float epsilon;
};

using Function = void (*)(const Rows& rows, int64_t first, int64_t last);  // rows [first, last)

struct Functions {
  Function forward, backward;
};

// For a level of level.h by its name.
BIMOS_EVERY_WIDTH(Functions functions())
inline Functions functions_for(const char* level) { return BIMOS_FOR_LEVEL(level, functions)(); }

}  // namespace bimos::norm
