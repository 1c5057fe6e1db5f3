// KL divergence of rows of logits, and its gradient, for training: the loss of distillation over a whole vocabulary (bimos/training/losses.py).
#pragma once

#include <cstdint>

#include "targets.h"

namespace bimos::divergence {

struct Logits {
  bool is_float;  // values are float32; else bfloat16
  const void *student, *teacher;  // [rows, n]
  void* slope;                    // [rows, n]: factor * (softmax(student / t) - softmax(teacher / t)); may be `student`
  float* value;                   // [rows]: KL(softmax(teacher / t) || softmax(student / t))
  int64_t n;
  float temperature, factor;
};

using Function = void (*)(const Logits& logits, int64_t first, int64_t last);  // rows [first, last)

// For a level of level.h by its name.
BIMOS_EVERY_WIDTH(Function function())
inline Function function_for(const char* level) { return BIMOS_FOR_LEVEL(level, function)(); }

}  // namespace bimos::divergence
