// Rows of integers by AVX2: activations are 16 bits wide, exact but for their rounding to 1/32512 of the largest.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "int4.h"
#include "level.h"
#include "targets.h"
#include "tiles.h"

#define TARGET BIMOS_AVX2

namespace bimos {
namespace {

constexpr float kLargest = 32512;
constexpr int64_t kHeader = 64;    // bytes before a token's values: their scale
constexpr int64_t kSafe = 4096;    // inputs whose products 32-bit lanes can hold the sum of

size_t int8_bytes(int64_t n) { return static_cast<size_t>(kHeader + ceil_div(n, 32) * 64); }

TARGET void int8_prepare(const float* x, int64_t n, uint8_t* prepared) {
  float largest = 0, strange = 0;
  for (int64_t j = 0; j < n; ++j) {
    largest = std::max(largest, std::fabs(x[j]));
    strange += x[j] - x[j];  // NaN where any value is not finite
  }
  const float inverse = largest > 1e-30F ? kLargest / largest : 0.0F;
  auto* values = reinterpret_cast<int16_t*>(prepared + kHeader);
  int64_t j = 0;
  for (; j < n; ++j) values[j] = static_cast<int16_t>(_mm_cvtss_si32(_mm_set_ss(x[j] * inverse)));
  for (; j < ceil_div(n, 32) * 32; ++j) values[j] = 0;
  *reinterpret_cast<float*>(prepared) = largest / kLargest + strange;
}

// The sums of eight registers, one a lane.
TARGET inline __m256 sums_of(const __m256* rows) {
  const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
  const __m256 second = _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}

// The first `count` of eight values, or all.
TARGET inline void store_some(__m256 values, int64_t count, float* to) {
  float eight[8];
  _mm256_storeu_ps(eight, values);
  std::copy_n(eight, std::min<int64_t>(8, count), to);
}

TARGET inline __m256i widened(const int8_t* bytes) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))); }

// Two rows, each lane's share of their sums.
template <int kCount>
TARGET inline void two_rows(const int8_t* const* row, int64_t n, const int16_t* const* x, __m256 (*sums)[2]) {
  for (int t = 0; t < kCount; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_ps();
  for (int64_t start = 0; start < n; start += kSafe) {
    const int64_t end = std::min(n, start + kSafe);
    __m256i whole[kCount][2];
    for (int t = 0; t < kCount; ++t) whole[t][0] = whole[t][1] = _mm256_setzero_si256();
    const auto step = [&](const __m256i* values, int64_t j) TARGET __attribute__((always_inline)) {
      for (int t = 0; t < kCount; ++t) {
        const __m256i token = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[t] + j));
        for (int i = 0; i < 2; ++i) whole[t][i] = _mm256_add_epi32(whole[t][i], _mm256_madd_epi16(values[i], token));
      }
    };
    int64_t j = start;
    for (; j + 16 <= end; j += 16) {
      _mm_prefetch(reinterpret_cast<const char*>(row[0] + 2 * j + kAhead), _MM_HINT_T0);
      const __m256i values[2] = {widened(row[0] + j), widened(row[1] + j)};
      step(values, j);
    }
    if (j < end) {
      int8_t last[2][16] = {};
      for (int i = 0; i < 2; ++i) std::copy(row[i] + j, row[i] + end, last[i]);
      const __m256i values[2] = {widened(last[0]), widened(last[1])};
      step(values, j);
    }
    for (int t = 0; t < kCount; ++t)
      for (int i = 0; i < 2; ++i) sums[t][i] = _mm256_add_ps(sums[t][i], _mm256_cvtepi32_ps(whole[t][i]));
  }
}

template <int kCount>
TARGET void int8_tokens(const int8_t* weight, int64_t rows, int64_t n, const uint8_t* const* prepared, float* const* y) {
  const int16_t* x[kCount];
  for (int t = 0; t < kCount; ++t) x[t] = reinterpret_cast<const int16_t*>(prepared[t] + kHeader);
  for (int64_t first = 0; first < rows; first += 8) {
    __m256 sums[kCount][8];
    for (int r = 0; r < 8; r += 2) {
      const int8_t* row[2] = {weight + std::min(rows - 1, first + r) * n, weight + std::min(rows - 1, first + r + 1) * n};
      __m256 part[kCount][2];
      two_rows<kCount>(row, n, x, part);
      for (int t = 0; t < kCount; ++t) {
        sums[t][r] = part[t][0];
        sums[t][r + 1] = part[t][1];
      }
    }
    for (int t = 0; t < kCount; ++t) {
      const __m256 scale = _mm256_set1_ps(*reinterpret_cast<const float*>(prepared[t]));
      store_some(_mm256_mul_ps(sums_of(sums[t]), scale), rows - first, y[t] + first);
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

TARGET inline __m256i four_bytes(const uint8_t* from) {
  int32_t bytes = 0;
  std::memcpy(&bytes, from, 4);
  return _mm256_set1_epi32(bytes);
}

// Eight of a tile's rows. Sums of 16 bits hold a group: 16 products of a code and a byte are at most 16 * 15 * 128.
template <int kCount>
TARGET inline void half_tile(const uint8_t* tile, int64_t half, int64_t n, const uint8_t* const* prepared, __m256* total) {
  const __m256i nibble = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  const int64_t groups = int4_groups(n);
  const auto* halves = reinterpret_cast<const uint16_t*>(tile + groups * kTileGroup) + 8 * half;
  for (int t = 0; t < kCount; ++t) total[t] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* ahead = tile + kAhead + g * (kTileGroup + kTileRows * 2);
    for (int line = 0; half == 0 && line < 5; ++line) _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * line), _MM_HINT_T0);
    __m256i upper[kCount], lower[kCount];
    for (int t = 0; t < kCount; ++t) upper[t] = lower[t] = _mm256_setzero_si256();
    for (int q = 0; q < 4; ++q) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + g * kTileGroup + 64 * q + 32 * half));
      const __m256i even = _mm256_and_si256(bits, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble);
      for (int t = 0; t < kCount; ++t) {
        const uint8_t* high = prepared[t] + g * 64 + 8 * q;
        upper[t] = _mm256_add_epi16(upper[t], _mm256_maddubs_epi16(even, four_bytes(high)));
        lower[t] = _mm256_add_epi16(lower[t], _mm256_maddubs_epi16(even, four_bytes(high + kGroup)));
        upper[t] = _mm256_add_epi16(upper[t], _mm256_maddubs_epi16(odd, four_bytes(high + 4)));
        lower[t] = _mm256_add_epi16(lower[t], _mm256_maddubs_epi16(odd, four_bytes(high + kGroup + 4)));
      }
    }
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + g * kTileRows)), fifteen = _mm_set1_epi16(15);
    const __m256 scale = _mm256_cvtph_ps(_mm_andnot_si128(fifteen, stored));
    const __m256 zero = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_and_si128(fifteen, stored)));
    for (int t = 0; t < kCount; ++t) {
      const __m256i high = _mm256_slli_epi32(_mm256_madd_epi16(upper[t], ones), 8);
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(high, _mm256_madd_epi16(lower[t], ones)));
      const __m256 centred = _mm256_fnmadd_ps(zero, _mm256_set1_ps(int4_sums(prepared[t], n)[g]), sum);
      total[t] = _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(int4_scales(prepared[t], n)[g])), centred, total[t]);
    }
  }
}

template <int kCount>
TARGET void int4_tokens(const uint8_t* tiles, int64_t rows, int64_t n, const uint8_t* const* prepared, float* const* y) {
  for (int64_t first = 0; first < rows; first += kTileRows, tiles += int4_tile_bytes(n)) {
    for (int64_t half = 0; half < 2 && first + 8 * half < rows; ++half) {
      __m256 total[kCount];
      half_tile<kCount>(tiles, half, n, prepared, total);
      for (int t = 0; t < kCount; ++t) store_some(total[t], rows - first - 8 * half, y[t] + first + 8 * half);
    }
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

const Rows& avx2_rows() {
  static const Rows rows{int8_bytes, int8_prepare, int8, int4};
  return rows;
}

}  // namespace bimos
