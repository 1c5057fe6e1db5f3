// Scales mixed per token, forward and backward, for training (the equations are in bimos/methods/mixing.py). Rows of one or two bytes
// a value are read once: torch's own operations would write every mix to memory, and read all of it again for every gradient.
#pragma once

#include <cstdint>

#include "targets.h"

namespace bimos::mixing {

// Of a batch of tokens: pointers to rows of `n` values, `experts` float32 rows of scales and of the router.
struct Batch {
  int64_t n;
  bool is_float;             // values are float32; else bfloat16
  const void *x, *grad;      // [tokens, n]
  void* out;                 // [tokens, n]: the result, or the gradient of x
  float* gate;               // [tokens, experts]; null: one expert, no gate
  float* grad_gate;          // [tokens, experts]
  const float *scales, *router;       // [experts, n]; the router may be null
  float *grad_scales, *grad_router;   // [experts, n], added to
};

using Function = void (*)(const Batch& batch, int64_t first, int64_t last);  // tokens [first, last)

struct Functions {
  Function forward;   // out = x * sum_e gate_e scales_e; with a router, gate = softmax(router x) comes first
  Function backward;  // gradients of x, gate (or router) and scales; `grad_gate` is what came from elsewhere where there is a router
};

// For a level of level.h by its name; nulls where the number of experts is not among 1, 2, 4 and 8.
BIMOS_EVERY_WIDTH(Functions functions_for(int64_t experts))
inline Functions functions_for(const char* level, int64_t experts) { return BIMOS_FOR_LEVEL(level, functions_for)(experts); }

}  // namespace bimos::mixing
