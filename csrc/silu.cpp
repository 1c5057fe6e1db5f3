#include "silu.h"

#include <cstring>

#include "vectors.h"

namespace bimos::silu {
namespace {

BIMOS_INLINE Floats sigmoid(Floats x) { return 1.0F / (1.0F + exponential(-x)); }

template <typename T>
BIMOS_INLINE void forward_some(const Values& values, int64_t first, int64_t last) {
  const T *gate = static_cast<const T*>(values.gate) + first, *up = static_cast<const T*>(values.up) + first;
  T* out = static_cast<T*>(values.out) + first;
  vectors(last - first, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    const Floats x = load(gate + j, count);
    store(x * sigmoid(x) * load(up + j, count), out + j, count);
  });
}

template <typename T>
BIMOS_INLINE void backward_some(const Values& values, int64_t first, int64_t last) {
  const T *gate = static_cast<const T*>(values.gate) + first, *up = static_cast<const T*>(values.up) + first;
  const T* grad = static_cast<const T*>(values.grad) + first;
  T *of_gate = static_cast<T*>(values.of_gate) + first, *of_up = static_cast<T*>(values.of_up) + first;
  vectors(last - first, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    const Floats x = load(gate + j, count), given = load(grad + j, count), share = sigmoid(x);
    store(given * load(up + j, count) * share * (1.0F + x * (1.0F - share)), of_gate + j, count);
    store(given * x * share, of_up + j, count);
  });
}

#define BIMOS_SILU(NAME, TARGET)                                                             \
  namespace NAME {                                                                           \
  template <typename T>                                                                      \
  TARGET void forward_of(const Values& values, int64_t first, int64_t last) {                \
    forward_some<T>(values, first, last);                                                    \
  }                                                                                          \
  template <typename T>                                                                      \
  TARGET void backward_of(const Values& values, int64_t first, int64_t last) {               \
    backward_some<T>(values, first, last);                                                   \
  }                                                                                          \
  void forward(const Values& values, int64_t first, int64_t last) {                          \
    (values.is_float ? forward_of<float> : forward_of<uint16_t>)(values, first, last);       \
  }                                                                                          \
  void backward(const Values& values, int64_t first, int64_t last) {                         \
    (values.is_float ? backward_of<float> : backward_of<uint16_t>)(values, first, last);     \
  }                                                                                          \
  constexpr Functions functions{forward, backward};                                          \
  }

BIMOS_SILU(scalar, )
#ifdef BIMOS_X86
BIMOS_SILU(avx2, __attribute__((target("avx2,fma,f16c"))))
BIMOS_SILU(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))))
#endif

}  // namespace

const Functions& functions_for(const char* level) {
#ifdef BIMOS_X86
  if (std::strcmp(level, "avx512") == 0) return avx512::functions;
  if (std::strcmp(level, "avx2") == 0) return avx2::functions;
#endif
  return scalar::functions;
}

}  // namespace bimos::silu
