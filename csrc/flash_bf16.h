// Attention in training, by products of bfloat16 where the processor has them.
#pragma once

#include "flash.h"

namespace bimos::flash {

// What `functions_for` gives, or these.
Functions training_for(const char* level, bool is_float);

}  // namespace bimos::flash
