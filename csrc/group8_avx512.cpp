// Sums of four products of bytes an instruction, 48 rows by up to four tokens in registers: twice what vdpbf16ps multiplies.
#include "group8_avx512.h"

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "vectors.h"

#define TARGET BIMOS_AVX512

namespace bimos::group8 {
namespace {

constexpr int kTokens = 4;  // whose sums, of a group and of all before it, fill 24 registers; three hold weights, one values
constexpr int kVectors = 3;  // of rows

TARGET inline __m512i shuffle_of_low_bytes() {  // of 16 words of a, 16 of b, in turns
  alignas(64) uint8_t index[64] = {};
  for (int i = 0; i < 16; ++i) {
    index[2 * i] = static_cast<uint8_t>(4 * i);
    index[2 * i + 1] = static_cast<uint8_t>(64 + 4 * i);
  }
  return _mm512_load_si512(index);
}

TARGET void prepare(const uint16_t* x, int64_t in, int64_t first, int64_t last, const Values& values) {
  const int64_t groups = groups_of(in);
  const __m512i low_bytes = shuffle_of_low_bytes(), size = _mm512_set1_epi16(0x7fff), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512 rounder = _mm512_set1_ps(12582912.0F + 128);  // 1.5 * 2^23: the sum's last byte is the whole number + 128
  uint8_t* bytes = values.bytes + first * groups * kGroup;
  float* step = values.steps + first * groups;
  for (int64_t t = first; t < last; ++t) {
    for (int64_t start = 0; start < in; start += kGroup, bytes += kGroup, ++step) {
      const uint16_t* from = x + t * in + start;
      __m512i pairs[2];
      if (start + kGroup <= in) {
        for (int i = 0; i < 2; ++i) pairs[i] = _mm512_loadu_si512(from + 32 * i);
      } else {
        const uint64_t mask = (uint64_t{1} << (in - start)) - 1;
        for (int i = 0; i < 2; ++i) pairs[i] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> (32 * i)), from + 32 * i);
      }
      // As whole numbers, sizes are in order; the smallest of their complements is found by one instruction.
      const __m512i most = _mm512_max_epu16(_mm512_and_si512(pairs[0], size), _mm512_and_si512(pairs[1], size));
      const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
      const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
      const auto bits = static_cast<uint32_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)))) & 0xffff);
      const float largest = bits < 0x7f80 ? std::bit_cast<float>(bits << 16) : std::numeric_limits<float>::quiet_NaN();
      *step = largest / kMost;
      const __m512 inverse = _mm512_set1_ps(largest > kLeast ? kMost / largest : 0.0F);
      for (int i = 0; i < 2; ++i) {
        const __m512 even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16)), inverse, rounder);
        const __m512 odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs[i], upper)), inverse, rounder);
        const __m512i both = _mm512_permutex2var_epi8(_mm512_castps_si512(even), low_bytes, _mm512_castps_si512(odd));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + 32 * i), _mm512_castsi512_si256(both));
      }
    }
  }
}

// 64 tokens of sixteen columns, or fewer, rounded: for every four tokens, four signed bytes a column. Returns the columns' steps.
TARGET inline __m512 rounded_columns(const uint16_t* x, int64_t width, int64_t tokens, __mmask16 columns, __m512i* codes) {
  const __m256i size = _mm256_set1_epi16(0x7fff);
  __m256i most = _mm256_setzero_si256();
  for (int64_t t = 0; t < tokens; ++t) most = _mm256_max_epu16(most, _mm256_and_si256(_mm256_maskz_loadu_epi16(columns, x + t * width), size));
  const __m512i bits = _mm512_cvtepu16_epi32(most);
  const __mmask16 strange = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(0x7f80));
  const __m512 largest = _mm512_mask_mov_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), strange, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
  const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(kLeast), _CMP_GT_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(kMost), largest), rounder = _mm512_set1_ps(12582912.0F);  // 1.5 * 2^23
  const __m512i low_bytes = _mm512_set1_epi32(0x40004000);
  alignas(64) static constexpr uint32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i lane = _mm512_mullo_epi32(_mm512_load_si512(kLanes), _mm512_set1_epi32(0x04040404));
  const __m512i index = _mm512_add_epi8(low_bytes, lane);  // the low bytes of a lane of two vectors, twice
  for (int64_t t = 0; t < kGroup; t += 4) {
    __m512i whole[4];
    for (int64_t i = 0; i < 4; ++i) {
      const __m256i half = t + i < tokens ? _mm256_maskz_loadu_epi16(columns, x + (t + i) * width) : _mm256_setzero_si256();
      const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      whole[i] = _mm512_castps_si512(_mm512_fmadd_ps(value, inverse, rounder));
    }
    const __m512i first = _mm512_permutex2var_epi8(whole[0], index, whole[1]), second = _mm512_permutex2var_epi8(whole[2], index, whole[3]);
    codes[t / 4] = _mm512_mask_mov_epi16(first, 0xaaaaaaaa, second);
  }
  return _mm512_div_ps(largest, _mm512_set1_ps(kMost));
}

TARGET inline __mmask16 first_lanes(int64_t n) { return n >= kColumns ? 0xffff : n > 0 ? static_cast<__mmask16>((1U << n) - 1) : 0; }

TARGET void block(const Matrix& left, int64_t first, const Block& block) {
  const __mmask16 columns = first_lanes(left.width - first);
  for (int64_t g = 0; g < groups_of(left.tokens); ++g) {
    __m512i codes[kGroup / 4];
    const int64_t start = g * kGroup;
    const __m512 steps = rounded_columns(left.values + start * left.width + first, left.width, std::min(kGroup, left.tokens - start), columns, codes);
    _mm512_storeu_ps(block.steps + g * kColumns, steps);
    for (int64_t j = 0; j < kGroup / 4; ++j)
      _mm512_storeu_si512(block.bytes + (g * kGroup + 4 * j) * kColumns, _mm512_xor_si512(codes[j], _mm512_set1_epi8(-128)));
  }
}

TARGET void tile(const Matrix& right, int64_t first, uint8_t* tile) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t g = 0; g < groups_of(right.tokens); ++g, tile += kSteppedBytes) {
    for (int64_t v = 0; v < kVectors; ++v) {
      __m512i codes[kGroup / 4], sum = _mm512_setzero_si512();
      const int64_t start = g * kGroup, column = first + v * kColumns;
      const __mmask16 columns = first_lanes(right.width - column);
      const uint16_t* from = right.values + start * right.width + (columns ? column : 0);
      const __m512 steps = rounded_columns(from, right.width, std::min(kGroup, right.tokens - start), columns, codes);
      for (int64_t j = 0; j < kGroup / 4; ++j) {
        _mm512_storeu_si512(tile + kRows * 4 + 64 * (j * kVectors + v), codes[j]);
        sum = _mm512_dpbusd_epi32(sum, ones, codes[j]);
      }
      _mm512_storeu_si512(tile + 64 * v, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7)));
      _mm512_storeu_ps(tile + kGroupBytes + 64 * v, steps);
    }
  }
}

TARGET BIMOS_INLINE __m512i four_bytes(const uint8_t* from) {
  int32_t bytes = 0;
  std::memcpy(&bytes, from, 4);
  return _mm512_set1_epi32(bytes);
}

// total [kCount, 48] = sums of kCount tokens, or columns of a block, over all groups. Both kinds of sums stay in registers: stores of one kind at the end of every group
// take longer than what twice as many sums at a time would save.
template <int kCount, bool kStepped>
TARGET void sums_of_groups(const uint8_t* tile, int64_t groups, const uint8_t* bytes, const float* steps, float* total) {
  constexpr int64_t kWide = kStepped ? kColumns : 1;  // how far apart what follows lies
  const int64_t stride = kStepped ? 4 : groups * kGroup, step_stride = kStepped ? 1 : groups;
  __m512 totals[kCount][kVectors];
  for (int t = 0; t < kCount; ++t)
    for (int v = 0; v < kVectors; ++v) totals[t][v] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, tile += kStepped ? kSteppedBytes : kGroupBytes, bytes += kGroup * kWide) {
    __m512i sums[kCount][kVectors];
    for (int t = 0; t < kCount; ++t)
      for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_loadu_si512(tile + 64 * v);
    const uint8_t* weight = tile + kRows * 4;
#pragma GCC unroll 16  // all of a group: in a loop, GCC 12 writes all sums to memory at every turn
    for (int j = 0; j < kGroup; j += 4, weight += 64 * kVectors) {
      __m512i rows[kVectors];
      for (int v = 0; v < kVectors; ++v) rows[v] = _mm512_loadu_si512(weight + 64 * v);
      for (int t = 0; t < kCount; ++t) {
        const __m512i value = four_bytes(bytes + t * stride + j * kWide);
        for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], value, rows[v]);
      }
    }
    for (int t = 0; t < kCount; ++t) {
      const __m512 step = _mm512_set1_ps(steps[t * step_stride + g * kWide]);
      for (int v = 0; v < kVectors; ++v) {
        // One step after the other: their product could be too large for a float where the sum's is not.
        const __m512 sum = kStepped ? _mm512_mul_ps(_mm512_cvtepi32_ps(sums[t][v]), _mm512_loadu_ps(tile + kGroupBytes + 64 * v)) : _mm512_cvtepi32_ps(sums[t][v]);
        totals[t][v] = _mm512_fmadd_ps(sum, step, totals[t][v]);
      }
    }
  }
  for (int t = 0; t < kCount; ++t)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(total + (t * kVectors + v) * 16, totals[t][v]);
}

using Sums = void (*)(const uint8_t*, int64_t, const uint8_t*, const float*, float*);

TARGET void product(const Weights& weights, int64_t tile, const Values& values, int64_t first, int64_t last, uint16_t* y) {
  constexpr Sums kSums[kTokens] = {sums_of_groups<1, false>, sums_of_groups<2, false>, sums_of_groups<3, false>, sums_of_groups<4, false>};
  const int64_t groups = groups_of(weights.in), row = tile * kRows, rows = std::min(kRows, weights.out - row);
  const int64_t blocks = (last - first + kTokens - 1) / kTokens;
  alignas(64) float total[kTokens * kRows];
  for (int64_t block = 0; block < blocks; ++block) {  // as even as they can be: a few tokens alone leave registers idle
    const int64_t begin = first + (last - first) * block / blocks, end = first + (last - first) * (block + 1) / blocks;
    kSums[end - begin - 1](weights.tiles + tile * tile_bytes(weights.in), groups, values.bytes + begin * groups * kGroup, values.steps + begin * groups, total);
    for (int64_t r = 0; r < rows; r += kWidth) {
      const int64_t count = std::min<int64_t>(kWidth, rows - r);
      const Floats scale = load(weights.scale + row + r, count), bias = weights.bias == nullptr ? Floats{} : load(weights.bias + row + r, count);
      for (int64_t t = begin; t < end; ++t) store(load(total + (t - begin) * kRows + r, kWidth) * scale + bias, y + t * weights.out + row + r, count);
    }
  }
}

TARGET void outer(const uint8_t* tile, int64_t groups, const Block& block, int64_t rows, int64_t count, uint16_t* y, int64_t stride) {
  constexpr Sums kSums[kTokens] = {sums_of_groups<1, true>, sums_of_groups<2, true>, sums_of_groups<3, true>, sums_of_groups<4, true>};
  alignas(64) float total[kTokens * kRows];
  for (int64_t first = 0; first < rows; first += kTokens) {
    const int64_t some = std::min<int64_t>(kTokens, rows - first);
    kSums[some - 1](tile, groups, block.bytes + 4 * first, block.steps + first, total);
    for (int64_t r = 0; r < some; ++r)
      vectors(count, [&](int64_t i, int64_t n) BIMOS_ALWAYS { store(load(total + r * kRows + i, kWidth), y + (first + r) * stride + i, n); });
  }
}

}  // namespace

Functions avx512_functions() { return {prepare, product, block, tile, outer}; }

}  // namespace bimos::group8
