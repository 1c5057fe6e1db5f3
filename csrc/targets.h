// What an instruction level may use, and the same body compiled for each of them: targets of functions, not flags of files, so that one
// binary runs everywhere. The levels are those of level.h.
#pragma once

#include <cstring>

#define BIMOS_ALWAYS __attribute__((always_inline))
#define BIMOS_INLINE inline BIMOS_ALWAYS

#ifdef BIMOS_X86
#define BIMOS_AVX2 __attribute__((target("avx2,fma,f16c")))
#define BIMOS_AVX512_HAS "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c"
#if defined(__clang__)  // which ignores an attribute that has a part it does not know
#define BIMOS_AVX512 __attribute__((target(BIMOS_AVX512_HAS)))
#else
#define BIMOS_AVX512 __attribute__((target(BIMOS_AVX512_HAS ",prefer-vector-width=512")))
#endif
#endif

namespace bimos {

// A function that is always inlined, in one function a level.
template <auto kBody>
struct Compiled;

template <typename Result, typename... Given, Result (*kBody)(Given...)>
struct Compiled<kBody> {
  static Result scalar(Given... given) { return kBody(given...); }
#ifdef BIMOS_X86
  BIMOS_AVX2 static Result avx2(Given... given) { return kBody(given...); }
  BIMOS_AVX512 static Result avx512(Given... given) { return kBody(given...); }
#endif
};

// The body for a level, by its name: one for all, or as each has the registers for it.
template <auto kScalar, auto kAvx2 = kScalar, auto kAvx512 = kAvx2>
auto pick([[maybe_unused]] const char* level) {
#ifdef BIMOS_X86
  if (std::strcmp(level, "avx512") == 0) return Compiled<kAvx512>::avx512;
  if (std::strcmp(level, "avx2") == 0) return Compiled<kAvx2>::avx2;
#endif
  return Compiled<kScalar>::scalar;
}

}  // namespace bimos
