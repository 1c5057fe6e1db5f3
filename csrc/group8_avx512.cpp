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

TARGET BIMOS_INLINE __m512i four_bytes(const uint8_t* from) {
  int32_t bytes = 0;
  std::memcpy(&bytes, from, 4);
  return _mm512_set1_epi32(bytes);
}

// total [kCount, 48] = sums of kCount tokens over all groups. Both kinds of sums stay in registers: stores of one kind at the end of every group
// take longer than what twice as many sums at a time would save.
template <int kCount>
TARGET void sums_of_groups(const uint8_t* tile, int64_t groups, const uint8_t* bytes, const float* steps, float* total) {
  const int64_t stride = groups * kGroup;
  __m512 totals[kCount][kVectors];
  for (int t = 0; t < kCount; ++t)
    for (int v = 0; v < kVectors; ++v) totals[t][v] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, tile += kGroupBytes, bytes += kGroup) {
    __m512i sums[kCount][kVectors];
    for (int t = 0; t < kCount; ++t)
      for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_loadu_si512(tile + 64 * v);
    const uint8_t* weight = tile + kRows * 4;
#pragma GCC unroll 16  // all of a group: in a loop, GCC 12 writes all sums to memory at every turn
    for (int j = 0; j < kGroup; j += 4, weight += 64 * kVectors) {
      __m512i rows[kVectors];
      for (int v = 0; v < kVectors; ++v) rows[v] = _mm512_loadu_si512(weight + 64 * v);
      for (int t = 0; t < kCount; ++t) {
        const __m512i value = four_bytes(bytes + t * stride + j);
        for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], value, rows[v]);
      }
    }
    for (int t = 0; t < kCount; ++t) {
      const __m512 step = _mm512_set1_ps(steps[t * groups + g]);
      for (int v = 0; v < kVectors; ++v) totals[t][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][v]), step, totals[t][v]);
    }
  }
  for (int t = 0; t < kCount; ++t)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(total + (t * kVectors + v) * 16, totals[t][v]);
}

TARGET void product(const Weights& weights, int64_t tile, const Values& values, int64_t first, int64_t last, uint16_t* y) {
  using Sums = void (*)(const uint8_t*, int64_t, const uint8_t*, const float*, float*);
  constexpr Sums kSums[kTokens] = {sums_of_groups<1>, sums_of_groups<2>, sums_of_groups<3>, sums_of_groups<4>};
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

}  // namespace

Functions avx512_functions() { return {prepare, product}; }

}  // namespace bimos::group8
