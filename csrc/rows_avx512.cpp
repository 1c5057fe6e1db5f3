// Rows of integers by vpdpbusd: activations are 16 bits wide, split in two bytes, exact but for their rounding to 1/32512 of the largest.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int4.h"
#include "level.h"
#include "targets.h"
#include "tiles.h"

#define TARGET BIMOS_AVX512

namespace bimos {
namespace {

constexpr float kLargest = 32512;  // 127 * 256: the high byte stays signed
constexpr int kSixteen = 16;       // rows whose sums are made together

TARGET inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1U << n) - 1); }

// A token's values: signed high bytes and unsigned low bytes follow.
struct Split {
  float scale;
  float offset;  // 128 times the sum of all values: what the sums of weights + 128 have too much
  uint8_t pad[56];

  const uint8_t* high() const { return reinterpret_cast<const uint8_t*>(this + 1); }
  const uint8_t* low(int64_t n) const { return high() + ceil_div(n, 64) * 64; }
};

size_t int8_bytes(int64_t n) { return sizeof(Split) + 2 * static_cast<size_t>(ceil_div(n, 64) * 64); }

TARGET void int8_prepare(const float* x, int64_t n, uint8_t* prepared) {
  auto* split = reinterpret_cast<Split*>(prepared);
  __m512 most = _mm512_setzero_ps(), strange = most;
  for (int64_t j = 0; j < n; j += 16) {
    const __m512 value = _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - j), x + j));
    strange = _mm512_add_ps(strange, _mm512_sub_ps(value, value));
    most = _mm512_max_ps(most, value);
  }
  const float largest = _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(strange);  // NaN where any value is not finite
  const __m512 inverse = _mm512_set1_ps(largest > 1e-30F ? kLargest / largest : 0.0F);  // finite: below, all is next to nothing
  auto *high = prepared + sizeof(Split), *low = high + ceil_div(n, 64) * 64;
  __m512i sum = _mm512_setzero_si512();
  for (int64_t j = 0; j < ceil_div(n, 64) * 64; j += 16) {
    const __mmask16 mask = n > j && largest == largest ? first_lanes(n - j) : static_cast<__mmask16>(0);  // NaN: its scale says all
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(inverse, _mm512_maskz_loadu_ps(mask, x + j)));
    const __m512i upper = _mm512_srai_epi32(value, 8);
    sum = _mm512_add_epi32(sum, upper);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + j), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + j), _mm512_cvtepi32_epi8(value));
  }
  split->scale = largest / kLargest;
  split->offset = 128.0F * 256.0F * static_cast<float>(_mm512_reduce_add_epi32(sum));
}

// The sums of sixteen registers, one a lane.
TARGET inline __m512 sums_of(const __m512* rows) {
  __m512 fours[4];  // in every quarter, its share of four sums
  for (int i = 0; i < 4; ++i) {
    const __m512 *r = rows + 4 * i;
    const __m512d first = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1])));
    const __m512d second = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3])));
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)), _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  }
  __m512 eights[2];
  for (int i = 0; i < 2; ++i)
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x44), _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

// kRows rows, each lane's share of their sums.
template <int kCount, int kRows>
TARGET inline void some_rows(const int8_t* const* row, int64_t n, const uint8_t* const* high, const uint8_t* const* low, __m512 (*sums)[kSixteen]) {
  const __m512i flip = _mm512_set1_epi8(-128);  // to weights + 128, unsigned
  const auto step = [&](__m512i (*upper)[kRows], __m512i (*lower)[kRows], int64_t j, __mmask64 mask) TARGET __attribute__((always_inline)) {
    for (int i = 0; i < kRows; ++i) {
      const __m512i values = mask == ~__mmask64{0} ? _mm512_loadu_si512(row[i] + j) : _mm512_maskz_loadu_epi8(mask, row[i] + j);
      const __m512i positive = _mm512_xor_si512(values, flip);
      for (int t = 0; t < kCount; ++t) {
        upper[t][i] = _mm512_dpbusd_epi32(upper[t][i], positive, _mm512_loadu_si512(high[t] + j));
        lower[t][i] = _mm512_dpbusd_epi32(lower[t][i], _mm512_loadu_si512(low[t] + j), values);
      }
    }
  };
  __m512i upper[kCount][kRows], lower[kCount][kRows];
  for (int t = 0; t < kCount; ++t)
    for (int i = 0; i < kRows; ++i) upper[t][i] = lower[t][i] = _mm512_setzero_si512();
  const int8_t* ahead = row[0] + kAhead;
  int64_t j = 0;
  for (; j + 64 <= n; j += 64, ahead += 64 * kRows) {
    for (int i = 0; i < kRows; ++i) _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * i), _MM_HINT_T0);
    step(upper, lower, j, ~__mmask64{0});
  }
  if (j < n) step(upper, lower, j, ~__mmask64{0} >> (64 - (n - j)));
  for (int t = 0; t < kCount; ++t)
    for (int i = 0; i < kRows; ++i)
      sums[t][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper[t][i]), _mm512_set1_ps(256), _mm512_cvtepi32_ps(lower[t][i]));
}

template <int kCount>
TARGET void int8_tokens(const int8_t* weight, int64_t rows, int64_t n, const uint8_t* const* prepared, float* const* y) {
  constexpr int kRows = kCount > 2 ? 2 : 4;  // whose sums are in registers, two a token
  const uint8_t *high[kCount], *low[kCount];
  for (int t = 0; t < kCount; ++t) {
    high[t] = reinterpret_cast<const Split*>(prepared[t])->high();
    low[t] = reinterpret_cast<const Split*>(prepared[t])->low(n);
  }
  for (int64_t first = 0; first < rows; first += kSixteen) {
    __m512 sums[kCount][kSixteen];
    for (int r = 0; r < kSixteen; r += kRows) {
      const int8_t* row[kRows];
      for (int i = 0; i < kRows; ++i) row[i] = weight + std::min(rows - 1, first + r + i) * n;
      __m512 part[kCount][kSixteen];
      some_rows<kCount, kRows>(row, n, high, low, part);
      for (int t = 0; t < kCount; ++t)
        for (int i = 0; i < kRows; ++i) sums[t][r + i] = part[t][i];
    }
    for (int t = 0; t < kCount; ++t) {
      const auto* split = reinterpret_cast<const Split*>(prepared[t]);
      const __m512 sum = _mm512_mul_ps(_mm512_sub_ps(sums_of(sums[t]), _mm512_set1_ps(split->offset)), _mm512_set1_ps(split->scale));
      _mm512_mask_storeu_ps(y[t] + first, first_lanes(rows - first), sum);
    }
  }
}

TARGET void int8(const int8_t* weight, int64_t rows, int64_t n, const uint8_t* const* prepared, int tokens, float* const* y) {
  switch (tokens) {
    case 1: return int8_tokens<1>(weight, rows, n, prepared, y);
    case 2: return int8_tokens<2>(weight, rows, n, prepared, y);
    case 3: return int8_tokens<3>(weight, rows, n, prepared, y);
    default: return int8_tokens<4>(weight, rows, n, prepared, y);
  }
}

TARGET inline __m512i four_bytes(const uint8_t* from) {
  int32_t bytes = 0;
  std::memcpy(&bytes, from, 4);
  return _mm512_set1_epi32(bytes);
}

template <int kCount>
TARGET void int4_tokens(const uint8_t* tiles, int64_t rows, int64_t n, const uint8_t* const* prepared, float* const* y) {
  const __m512i nibble = _mm512_set1_epi8(0x0f);
  const int64_t groups = int4_groups(n), bytes = int4_tile_bytes(n);
  for (int64_t first = 0; first < rows; first += kTileRows, tiles += bytes) {
    __m512 total[kCount];
    for (auto& sum : total) sum = _mm512_setzero_ps();
    const uint8_t* ahead = tiles + kAhead;
    const auto* halves = reinterpret_cast<const uint16_t*>(tiles + groups * kTileGroup);
    for (int64_t g = 0; g < groups; ++g, ahead += kTileGroup + kTileRows * 2) {
      for (int line = 0; line < 5; ++line) _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * line), _MM_HINT_T0);
      __m512i upper[kCount], lower[kCount];
      for (int t = 0; t < kCount; ++t) upper[t] = lower[t] = _mm512_setzero_si512();
      for (int q = 0; q < 4; ++q) {
        const __m512i bits = _mm512_loadu_si512(tiles + g * kTileGroup + 64 * q);
        const __m512i even = _mm512_and_si512(bits, nibble), odd = _mm512_and_si512(_mm512_srli_epi16(bits, 4), nibble);
        for (int t = 0; t < kCount; ++t) {
          const uint8_t* high = prepared[t] + g * 64 + 8 * q;
          upper[t] = _mm512_dpbusd_epi32(upper[t], even, four_bytes(high));
          lower[t] = _mm512_dpbusd_epi32(lower[t], even, four_bytes(high + kGroup));
          upper[t] = _mm512_dpbusd_epi32(upper[t], odd, four_bytes(high + 4));
          lower[t] = _mm512_dpbusd_epi32(lower[t], odd, four_bytes(high + kGroup + 4));
        }
      }
      const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + g * kTileRows)), fifteen = _mm256_set1_epi16(15);
      const __m512 scale = _mm512_cvtph_ps(_mm256_andnot_si256(fifteen, stored));
      const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_and_si256(fifteen, stored)));
      for (int t = 0; t < kCount; ++t) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper[t], 8), lower[t]));
        const __m512 centred = _mm512_fnmadd_ps(zero, _mm512_set1_ps(int4_sums(prepared[t], n)[g]), sum);
        total[t] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(int4_scales(prepared[t], n)[g])), centred, total[t]);
      }
    }
    for (int t = 0; t < kCount; ++t) _mm512_mask_storeu_ps(y[t] + first, first_lanes(rows - first), total[t]);
  }
}

TARGET void int4(const uint8_t* tiles, int64_t rows, int64_t n, const uint8_t* const* prepared, int tokens, float* const* y) {
  switch (tokens) {
    case 1: return int4_tokens<1>(tiles, rows, n, prepared, y);
    case 2: return int4_tokens<2>(tiles, rows, n, prepared, y);
    case 3: return int4_tokens<3>(tiles, rows, n, prepared, y);
    default: return int4_tokens<4>(tiles, rows, n, prepared, y);
  }
}

}  // namespace

const Rows& avx512_rows() {
  static const Rows rows{int8_bytes, int8_prepare, int8, int4};
  return rows;
}

}  // namespace bimos
