// silu(gate) * up, forward and backward, for training (bimos/training/fused.py).
#pragma once

#include <cstdint>

#include "targets.h"

namespace bimos::silu {

struct Values {
  bool is_float;  // else bfloat16
  const void *gate, *up, *grad;  // the gradient in backward only
  void *out;                     // forward
  void *of_gate, *of_up;         // backward
};

using Function = void (*)(const Values& values, int64_t first, int64_t last);  // values [first, last)

struct Functions {
  Function forward, backward;
};

// For a level of level.h by its name.
BIMOS_EVERY_WIDTH(Functions functions())
inline Functions functions_for(const char* level) { return BIMOS_FOR_LEVEL(level, functions)(); }

}  // namespace bimos::silu
