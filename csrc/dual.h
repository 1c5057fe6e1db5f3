// Weights of two planes of zeros and ones, forward and backward, for training (the equations are in bimos/methods/dbllm.py): a pass over the
// latents each, where torch's own operations would take a dozen.
#pragma once

#include <cstdint>

#include "targets.h"

namespace bimos::dual {

struct Weights {
  int64_t in, out, group;            // the last group of a row may have fewer than `group` inputs
  bool in_steps;                     // latents are in steps of their group
  bool is_float;                     // weights and their gradient are float32; else bfloat16
  const float *latent, *scale;       // [out, in], [2, out, groups]
  void* weight;                      // forward: [out, in]
  const void* grad;                  // backward: [out, in]
  float *of_latent, *of_scale;       // [out, in], [2, out, groups]

  int64_t groups() const { return (in + group - 1) / group; }
};

using Function = void (*)(const Weights& weights, int64_t first, int64_t last);  // rows [first, last)

struct Functions {
  Function forward, backward;
};

// For a level of level.h by its name.
BIMOS_EVERY_WIDTH(Functions functions())
inline Functions functions_for(const char* level) { return BIMOS_FOR_LEVEL(level, functions)(); }

}  // namespace bimos::dual
