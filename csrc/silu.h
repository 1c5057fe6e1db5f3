// silu(gate) * up, forward and backward, for training (bimos/training/fused.py).
#pragma once

#include <cstdint>

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
Functions functions_for(const char* level);

}  // namespace bimos::silu
