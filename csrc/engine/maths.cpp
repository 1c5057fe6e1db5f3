#include "maths.h"

namespace bimos::maths {

Maths maths_for(const char* level) {
  return {pick<rms_norm>(level), pick<rotate>(level), pick<swiglu>(level), pick<attend>(level),
          pick<remember>(level), pick<add>(level), pick<dot>(level), pick<multiply>(level)};
}

}  // namespace bimos::maths
