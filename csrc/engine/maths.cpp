// One body for every instruction level: a function with a target attribute inlines it, and the compiler makes of it what that processor
// can (targets.h).
#include "maths.h"

#include <cmath>

#include "attention.h"
#include "numbers.h"

namespace bimos::maths {
namespace {

// y = x / rms(x) * weight
BIMOS_INLINE void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* y) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * x[j];
  const float factor = 1.0F / std::sqrt(sum / static_cast<float>(n) + epsilon);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = x[j] * factor * weight[j];
}

// Rotates the pairs (j, j + n/2) of a head; `cosine` and `sine` hold n/2 values.
BIMOS_INLINE void rotate(float* x, const float* cosine, const float* sine, int64_t n) {
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    x[j] = a * cosine[j] - b * sine[j];
    x[j + half] = b * cosine[j] + a * sine[j];
  }
}

// gate = silu(gate) * up
BIMOS_INLINE void swiglu(float* gate, const float* up, int64_t n) {
  vectors(n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    const Floats x = load(gate + j, count);
    store(x / (1.0F + exponential(-x)) * load(up + j, count), gate + j, count);
  });
}

// Writes a position; int8 is rounded to 1/127 of the largest, and NaN where any value is not finite.
BIMOS_INLINE void remember(const float* from, int64_t n, int64_t position, const Cache& to) {
  if (to.halves != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to.halves[position * n + j] = to_bfloat16(from[j]);
    return;
  }
  float largest = 0, strange = 0;
#pragma omp simd reduction(max : largest) reduction(+ : strange)
  for (int64_t j = 0; j < n; ++j) {
    const float size = from[j] < 0 ? -from[j] : from[j];
    largest = size > largest ? size : largest;
    strange += from[j] - from[j];
  }
  const float inverse = largest > 0 && strange == 0 ? 127.0F / largest : 0.0F;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float whole = std::floor(from[j] * inverse + 0.5F);
    to.bytes[position * n + j] = static_cast<int8_t>(whole == whole ? static_cast<int32_t>(whole) : 0);
  }
  to.scale[position] = largest / 127.0F + strange;
}

BIMOS_INLINE float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

// y *= scale
BIMOS_INLINE void multiply(const float* scale, int64_t n, float* y) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] *= scale[j];
}

// sum += part
BIMOS_INLINE void add(const float* part, int64_t n, float* sum) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sum[j] += part[j];
}

}  // namespace

Maths BIMOS_HERE::maths() {
  return {of_width<kWidth, rms_norm>(), of_width<kWidth, rotate>(), of_width<kWidth, swiglu>(), of_width<kWidth, attend>(),
          of_width<kWidth, remember>(), of_width<kWidth, add>(), of_width<kWidth, dot>(), of_width<kWidth, multiply>()};
}

}  // namespace bimos::maths
