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

// A file with vectors (vectors.h) is compiled once for each width: what it defines for others is in a namespace of that width.
#define BIMOS_PASTED(a, b) a##b
#define BIMOS_PASTE(a, b) BIMOS_PASTED(a, b)
#define BIMOS_HERE BIMOS_PASTE(width, BIMOS_WIDTH)
#define BIMOS_EVERY_WIDTH(declaration) \
  namespace width4 {                   \
  declaration;                         \
  }                                    \
  namespace width8 {                   \
  declaration;                         \
  }                                    \
  namespace width16 {                  \
  declaration;                         \
  }
#ifdef BIMOS_X86
#define BIMOS_FOR_LEVEL(level, function) \
  (is_avx512(level) ? width16::function : std::strcmp(level, "avx2") == 0 ? width8::function : width4::function)
#else
#define BIMOS_FOR_LEVEL(level, function) (static_cast<void>(level), width4::function)
#endif

namespace bimos {

// Whether a level of level.h, by its name, has the vectors of AVX-512.
inline bool is_avx512([[maybe_unused]] const char* level) {
#ifdef BIMOS_X86
  return std::strcmp(level, "avx512") == 0 || std::strcmp(level, "amx") == 0;
#else
  return false;
#endif
}

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

// The body for a level, by its name.
template <auto kBody>
auto pick([[maybe_unused]] const char* level) {
#ifdef BIMOS_X86
  if (is_avx512(level)) return Compiled<kBody>::avx512;
  if (std::strcmp(level, "avx2") == 0) return Compiled<kBody>::avx2;
#endif
  return Compiled<kBody>::scalar;
}

// The body for the level whose vectors are that wide.
template <int kWide, auto kBody>
auto of_width() {
#ifdef BIMOS_X86
  if constexpr (kWide == 16) return Compiled<kBody>::avx512;
  if constexpr (kWide == 8) return Compiled<kBody>::avx2;
#endif
  if constexpr (kWide == 4) return Compiled<kBody>::scalar;
}

}  // namespace bimos
