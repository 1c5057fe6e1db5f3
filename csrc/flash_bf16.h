// Attention by products of bfloat16 where the processor has them.
#pragma once

#include "flash.h"

namespace bimos::flash {

// What `functions_for` gives, or these.
Functions training_for(const char* level, bool is_float);

// What `prompt_for` gives, or what goes by the matrix unit.
PromptFunction reading_for(const char* level);

}  // namespace bimos::flash
