// Attention in training, by products of bfloat16 where the processor has them.
#pragma once

#include "flash.h"

namespace bimos::flash {

struct Training {
  Function forward, backward;
};

// For a level of level.h by its name, and float32 or bfloat16.
Training training_for(const char* level, bool is_float);

}  // namespace bimos::flash
