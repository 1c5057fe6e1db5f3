// What a model does besides its linears, on rows of float32. One body for every instruction level: a function with a target
// attribute inlines it, and the compiler makes of it what that processor can (targets.h).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "attention.h"

namespace bimos::maths {

BIMOS_INLINE uint16_t to_bfloat16(float value) {  // to nearest even; NaN stays NaN
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// e^x to 2e-7 relative, as polynomials do (Cephes); 0 below -87, where float32 ends.
BIMOS_INLINE float exponential(float x) {
  const float clamped = x < -87.3F ? -87.3F : (x > 88.3F ? 88.3F : x);
  const float whole = std::floor(clamped * 1.44269504F + 0.5F);
  const float rest = clamped - whole * 0.693359375F + whole * 2.12194440e-4F;
  float sum = 1.9875691500e-4F;
  sum = sum * rest + 1.3981999507e-3F;
  sum = sum * rest + 8.3334519073e-3F;
  sum = sum * rest + 4.1665795894e-2F;
  sum = sum * rest + 1.6666665459e-1F;
  sum = sum * rest + 5.0000001201e-1F;
  sum = sum * rest * rest + rest + 1.0F;
  const float power = std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
  return x < -87.3F ? 0.0F : (x != x ? x : sum * power);
}

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
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) gate[j] = gate[j] / (1.0F + exponential(-gate[j])) * up[j];
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

struct Maths {
  void (*rms_norm)(const float*, const float*, int64_t, float, float*);
  void (*rotate)(float*, const float*, const float*, int64_t);
  void (*swiglu)(float*, const float*, int64_t);
  void (*attend)(const Attention&);
  void (*remember)(const float*, int64_t, int64_t, const Cache&);
  void (*add)(const float*, int64_t, float*);
  float (*dot)(const float*, const float*, int64_t);
  void (*multiply)(const float*, int64_t, float*);
};

// Those for a level of level.h, by its name.
Maths maths_for(const char* level);

}  // namespace bimos::maths
