// The same by vpmaddwd.
#pragma once

#include "int16.h"

namespace bimos::int16 {

Functions avx2_functions();

}  // namespace bimos::int16
