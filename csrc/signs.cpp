#include "signs.h"

#include <cstring>

#include "targets.h"

#ifdef BIMOS_X86
#include <immintrin.h>
#endif

namespace bimos {
namespace {

uint8_t byte_of(const float* values, int64_t stride) {
  int byte = 0;
  for (int bit = 0; bit < 8; ++bit) byte |= (values[bit * stride] >= 0) << bit;
  return static_cast<uint8_t>(byte);
}

#ifdef BIMOS_X86
BIMOS_AVX512 int64_t sixteen_at_a_time(const float* values, int64_t count, uint8_t* bits) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), _mm512_setzero_ps(), _CMP_GE_OQ);
    std::memcpy(bits + i / 8, &mask, 2);
  }
  return i;
}

// Eight rows of sixteen columns: a byte of each column.
BIMOS_AVX512 void sixteen_columns(const float* values, int64_t in, int64_t stride, uint8_t* bits) {
  __m128i bytes = _mm_setzero_si128();
  for (int bit = 0; bit < 8; ++bit) {
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + bit * in), _mm512_setzero_ps(), _CMP_GE_OQ);
    bytes = _mm_or_si128(bytes, _mm_maskz_set1_epi8(mask, static_cast<char>(1 << bit)));
  }
  uint8_t column[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(column), bytes);
  for (int c = 0; c < 16; ++c) bits[c * stride] = column[c];
}
#endif

}  // namespace

void sign_bits(const char* level, const float* values, int64_t in, int64_t first, int64_t last, uint8_t* bits) {
  int64_t i = first * in;
#ifdef BIMOS_X86
  if (is_avx512(level)) i += sixteen_at_a_time(values + i, (last - first) * in, bits + i / 8);
#endif
  for (; i < last * in; i += 8) bits[i / 8] = byte_of(values + i, 1);
}

void sign_bits_of_columns(const char* level, const float* values, int64_t out, int64_t in, int64_t first, int64_t last, uint8_t* bits) {
  const int64_t stride = out / 8;
  const bool wide = is_avx512(level);
  for (int64_t row = 0; row < out; row += 8) {
    int64_t j = first;
#ifdef BIMOS_X86
    for (; wide && j + 16 <= last; j += 16) sixteen_columns(values + row * in + j, in, stride, bits + j * stride + row / 8);
#endif
    for (; j < last; ++j) bits[j * stride + row / 8] = byte_of(values + row * in + j, in);
  }
}

}  // namespace bimos
