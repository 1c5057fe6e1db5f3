#include "silu.h"

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

BIMOS_INLINE void forward(const Values& values, int64_t first, int64_t last) {
  values.is_float ? forward_some<float>(values, first, last) : forward_some<uint16_t>(values, first, last);
}

BIMOS_INLINE void backward(const Values& values, int64_t first, int64_t last) {
  values.is_float ? backward_some<float>(values, first, last) : backward_some<uint16_t>(values, first, last);
}

}  // namespace

Functions BIMOS_HERE::functions() { return {of_width<kWidth, forward>(), of_width<kWidth, backward>()}; }

}  // namespace bimos::silu
