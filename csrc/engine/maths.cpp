#include "maths.h"

#include <cstring>

namespace bimos::maths {
namespace {

// The same functions for a target.
#define BIMOS_MATHS(NAME, TARGET)                                                                                                         \
  namespace NAME {                                                                                                                        \
  TARGET void norm_(const float* x, const float* w, int64_t n, float e, float* y) { rms_norm(x, w, n, e, y); }                              \
  TARGET void rotate_(float* x, const float* c, const float* s, int64_t n) { rotate(x, c, s, n); }                                          \
  TARGET void swiglu_(float* g, const float* u, int64_t n) { swiglu(g, u, n); }                                                             \
  TARGET void attend_(const Attention& a) { attend(a); }                                                                                   \
  TARGET void remember_(const float* x, int64_t n, int64_t p, const Cache& y) { remember(x, n, p, y); }                                     \
  TARGET void add_(const float* x, int64_t n, float* y) { add(x, n, y); }                                                                  \
  TARGET float dot_(const float* a, const float* b, int64_t n) { return dot(a, b, n); }                                                    \
  TARGET void multiply_(const float* x, int64_t n, float* y) { multiply(x, n, y); }                                                        \
  constexpr Maths functions{norm_, rotate_, swiglu_, attend_, remember_, add_, dot_, multiply_};                                          \
  }

BIMOS_MATHS(scalar, )
#ifdef BIMOS_X86
BIMOS_MATHS(avx2, __attribute__((target("avx2,fma,f16c"))))
#if defined(__clang__)  // which ignores an attribute that has a part it does not know
BIMOS_MATHS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))))
#else
BIMOS_MATHS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))))
#endif
#endif

}  // namespace

const Maths& maths_for(const char* level) {
#ifdef BIMOS_X86
  if (std::strcmp(level, "avx512") == 0) return avx512::functions;
  if (std::strcmp(level, "avx2") == 0) return avx2::functions;
#endif
  return scalar::functions;
}

}  // namespace bimos::maths
