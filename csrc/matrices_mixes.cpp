// Routers and scales of several tokens at a time.
#include <algorithm>

#include "pieces.h"

namespace bimos::matrices {

#ifdef BIMOS_X86
namespace {

BIMOS_AVX512 inline __m512 load_half(const uint16_t* from, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from)); }

constexpr int kSome = 4;  // tokens, and experts, that are taken together

template <int kTokens, int kExperts>
BIMOS_AVX512 void some_dots(const float* x, int64_t x_stride, const uint16_t* rows, int64_t n, float* logits, int64_t stride) {
  __m512 sums[kTokens][kExperts];
  for (int t = 0; t < kTokens; ++t)
    for (int e = 0; e < kExperts; ++e) sums[t][e] = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = lanes(n - j);
    __m512 row[kExperts];
    for (int e = 0; e < kExperts; ++e) row[e] = load_half(rows + e * n + j, mask);
    for (int t = 0; t < kTokens; ++t) {
      const __m512 value = _mm512_maskz_loadu_ps(mask, x + t * x_stride + j);
      for (int e = 0; e < kExperts; ++e) sums[t][e] = _mm512_fmadd_ps(value, row[e], sums[t][e]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int e = 0; e < kExperts; ++e) logits[t * stride + e] = _mm512_reduce_add_ps(sums[t][e]);
}

template <int kExperts>
BIMOS_AVX512 void mix_of(const float* x, int64_t x_stride, const float* gates, int64_t tokens, const uint16_t* rows, int64_t experts, int64_t stride,
                         int64_t n, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = lanes(n - j);
    __m512 row[kExperts];
    for (int e = 0; e < kExperts; ++e) row[e] = load_half(rows + e * stride + j, mask);
    for (int64_t t = 0; t < tokens; ++t) {
      __m512 scale = _mm512_mul_ps(_mm512_set1_ps(gates[t * experts]), row[0]);
      for (int e = 1; e < kExperts; ++e) scale = _mm512_fmadd_ps(_mm512_set1_ps(gates[t * experts + e]), row[e], scale);
      for (int64_t e = kExperts; e < experts; ++e)  // more than there are registers for
        scale = _mm512_fmadd_ps(_mm512_set1_ps(gates[t * experts + e]), load_half(rows + e * stride + j, mask), scale);
      _mm512_mask_storeu_ps(out + t * out_stride + j, mask, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, x + t * x_stride + j)));
    }
  }
}

}  // namespace

BIMOS_AVX512 void dots(const float* x, int64_t x_stride, int64_t tokens, const uint16_t* rows, int64_t experts, int64_t n, float* logits) {
  int64_t e = 0;
  for (; e + kSome <= experts; e += kSome) {
    int64_t t = 0;
    for (; t + kSome <= tokens; t += kSome) some_dots<kSome, kSome>(x + t * x_stride, x_stride, rows + e * n, n, logits + t * experts + e, experts);
    for (; t < tokens; ++t) some_dots<1, kSome>(x + t * x_stride, x_stride, rows + e * n, n, logits + t * experts + e, experts);
  }
  for (; e < experts; ++e)
    for (int64_t t = 0; t < tokens; ++t) some_dots<1, 1>(x + t * x_stride, x_stride, rows + e * n, n, logits + t * experts + e, experts);
}

BIMOS_AVX512 void mix(const float* x, int64_t x_stride, const float* gates, int64_t tokens, const uint16_t* rows, int64_t experts, int64_t stride,
                      int64_t n, float* out, int64_t out_stride) {
  const auto function = experts == 1 ? mix_of<1> : experts < 4 ? mix_of<2> : experts < 8 ? mix_of<4> : mix_of<8>;
  for (int64_t t = 0; t < tokens; t += kTile)  // whose lines the first cache holds
    function(x + t * x_stride, x_stride, gates + t * experts, std::min(kTile, tokens - t), rows, experts, stride, n, out + t * out_stride, out_stride);
}

#else
void dots(const float*, int64_t, int64_t, const uint16_t*, int64_t, int64_t, float*) {}
void mix(const float*, int64_t, const float*, int64_t, const uint16_t*, int64_t, int64_t, int64_t, float*, int64_t) {}
#endif

}  // namespace bimos::matrices
