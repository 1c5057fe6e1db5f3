// What the vector unit has to do with sums of the matrix unit. For matrices_multiply.h alone.
#pragma once

#include "pieces.h"

#ifdef BIMOS_X86
namespace bimos::matrices {
namespace {

constexpr int64_t kSixteen = amx::kWords;   // rows of a right side
constexpr int64_t kSum = kTile * kSixteen;  // values of a sum

// The sums of a unit, which are to be added to the rows of y while the next one is multiplied.
template <bool kInt8, int kColumns>
struct Owed {
  int64_t next = 0, tokens = 0;
  const int32_t *sums, *low, *lowest;  // `low` of two digits; `lowest` or null
  const float* steps;
  int64_t to_steps;  // of the next tile
  const float *before, *gates, *scales;  // sums so far, [tokens, `stride_before`]; shares of scales and these, float32 [experts, rows]; each or null
  float* to;
  int64_t stride_before, stride, experts;
  bool grouped;
  __m512 group_scales[kColumns];

  // What is due at each of so many depths, but for the first, when the sums may still be on their way.
  BIMOS_AVX512 BIMOS_INLINE void pay_part(int64_t depths) {
    if (next < tokens) pay(depths > 8 ? (tokens + 7) / 8 : tokens);
  }

  // Of so many more tokens. A function of its own: it has no registers to spare.
  BIMOS_AVX512 __attribute__((noinline)) void pay(int64_t count) {
    for (const int64_t end = std::min(tokens, next + count); next < end; ++next) {
      const int64_t tile = next >> 4, at = 2 * kSum * tile + kSixteen * (next & 15);
      const __m512 step = _mm512_set1_ps(steps[tile * to_steps + (next & 15)]);
      __m512 values[kColumns];
      for (int c = 0; c < kColumns; ++c) {
        values[c] = _mm512_cvtepi32_ps(_mm512_load_si512(sums + at + c * kSum));
        if (!kInt8)
          values[c] = _mm512_fmadd_ps(values[c], _mm512_set1_ps(256), _mm512_cvtepi32_ps(_mm512_load_si512(low + at + c * kSum)));
      }
      if (!kInt8 && lowest != nullptr) {
        for (int c = 0; c < kColumns; ++c)
          values[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(lowest + at + c * kSum)), _mm512_set1_ps(1.0F / 256), values[c]);
      }
      if (grouped) {
        for (int c = 0; c < kColumns; ++c) values[c] = _mm512_mul_ps(values[c], group_scales[c]);
      }
      if (before == nullptr) {
        for (int c = 0; c < kColumns; ++c) values[c] = _mm512_mul_ps(values[c], step);
      } else {
        for (int c = 0; c < kColumns; ++c) values[c] = _mm512_fmadd_ps(values[c], step, _mm512_loadu_ps(before + next * stride_before + c * kSixteen));
      }
      if (scales != nullptr) {
        __m512 mix[kColumns];
        const float *gate = gates + next * experts, *scale = scales;
        for (int c = 0; c < kColumns; ++c) mix[c] = _mm512_mul_ps(_mm512_set1_ps(gate[0]), _mm512_loadu_ps(scale + c * kSixteen));
        for (int64_t e = 1; e < experts; ++e) {
          scale += kColumns * kSixteen;
          for (int c = 0; c < kColumns; ++c) mix[c] = _mm512_fmadd_ps(_mm512_set1_ps(gate[e]), _mm512_loadu_ps(scale + c * kSixteen), mix[c]);
        }
        for (int c = 0; c < kColumns; ++c) values[c] = _mm512_mul_ps(values[c], mix[c]);
      }
      for (int c = 0; c < kColumns; ++c) _mm512_storeu_ps(to + next * stride + c * kSixteen, values[c]);
    }
  }
};

}  // namespace
}  // namespace bimos::matrices
#endif
