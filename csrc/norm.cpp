#include "norm.h"

#include <cmath>

#include "vectors.h"

namespace bimos::norm {
namespace {

template <typename T>
BIMOS_INLINE void forward_row(const Rows& rows, int64_t row) {
  const T* x = static_cast<const T*>(rows.x) + row * rows.n;
  T* out = static_cast<T*>(rows.out) + row * rows.n;
  Floats sum{};
  vectors(rows.n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    const Floats value = load(x + j, count);
    sum += value * value;
  });
  const float inverse = 1.0F / std::sqrt(sum_of(sum) / static_cast<float>(rows.n) + rows.epsilon);
  rows.inverse[row] = inverse;
  vectors(rows.n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    store(load(x + j, count) * inverse * load(rows.weight + j, count), out + j, count);
  });
}

// of_x = inverse * (g w - x^ mean(g w x^)), of_w += g x^, x^ = x * inverse
template <typename T>
BIMOS_INLINE void backward_row(const Rows& rows, int64_t row) {
  const T *x = static_cast<const T*>(rows.x) + row * rows.n, *grad = static_cast<const T*>(rows.grad) + row * rows.n;
  T* out = static_cast<T*>(rows.out) + row * rows.n;
  const float inverse = rows.inverse[row];
  Floats sum{};
  vectors(rows.n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    const Floats value = load(x + j, count) * inverse, given = load(grad + j, count);
    sum += value * given * load(rows.weight + j, count);
    store(load(rows.of_weight + j, count) + given * value, rows.of_weight + j, count);
  });
  const float mean = sum_of(sum) / static_cast<float>(rows.n);
  vectors(rows.n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    const Floats value = load(x + j, count) * inverse;
    store((load(grad + j, count) * load(rows.weight + j, count) - value * mean) * inverse, out + j, count);
  });
}

template <typename T>
BIMOS_INLINE void forward_of(const Rows& rows, int64_t first, int64_t last) {
  for (; first < last; ++first) forward_row<T>(rows, first);
}

template <typename T>
BIMOS_INLINE void backward_of(const Rows& rows, int64_t first, int64_t last) {
  for (; first < last; ++first) backward_row<T>(rows, first);
}

BIMOS_INLINE void forward(const Rows& rows, int64_t first, int64_t last) {
  rows.is_float ? forward_of<float>(rows, first, last) : forward_of<uint16_t>(rows, first, last);
}

BIMOS_INLINE void backward(const Rows& rows, int64_t first, int64_t last) {
  rows.is_float ? backward_of<float>(rows, first, last) : backward_of<uint16_t>(rows, first, last);
}

}  // namespace

Functions BIMOS_HERE::functions() { return {of_width<kWidth, forward>(), of_width<kWidth, backward>()}; }

}  // namespace bimos::norm
