// Two products a lane and their sum an instruction, 16 rows by five in registers: half again what multiply-adds of floats reach.
#include "int16_avx2.h"

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "targets.h"

#define TARGET BIMOS_AVX2

namespace bimos::int16 {
namespace {

constexpr int kVectors = 2;  // of 8 rows

// Steps of eight rows from the bits of their largest sizes, and what their values are to be multiplied by.
TARGET inline __m256 steps_and_inverses(__m256i bits, __m256& inverse) {
  const __m256i strange = _mm256_cmpgt_epi32(bits, _mm256_set1_epi32(0x7f7fffff));
  const __m256 largest = _mm256_blendv_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(std::numeric_limits<float>::quiet_NaN()), _mm256_castsi256_ps(strange));
  const __m256 most = _mm256_set1_ps(kMost);
  inverse = _mm256_and_ps(_mm256_div_ps(most, largest), _mm256_cmp_ps(largest, _mm256_set1_ps(kLeast), _CMP_GT_OQ));
  return _mm256_div_ps(largest, most);
}

TARGET inline __m256i size_of(__m256 value) { return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff)); }

// What is not finite becomes the lowest number, whose low half is zero.
TARGET inline __m256i whole(__m256 value, __m256 inverse) { return _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse)); }

TARGET inline __m256i first_lanes(int64_t count) {
  alignas(32) static constexpr int32_t kLanes[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(std::min<int64_t>(count, 8))), _mm256_load_si256(reinterpret_cast<const __m256i*>(kLanes)));
}

// Inputs `matrix.input` apart, rows side by side: eight rows at once.
TARGET void pack_columns(const Matrix& matrix, int64_t width, int32_t* panel) {
  const Groups groups(matrix.inputs);
  for (int64_t r = 0; r < width; r += 8) {
    const __m256i there = first_lanes(matrix.last - matrix.first - r);
    const auto kept = static_cast<size_t>(std::min<int64_t>(8, width - r)) * sizeof(int32_t);
    const float* from = matrix.values + matrix.first + std::min(r, matrix.last - matrix.first - 1);
    const auto row = [&](int64_t k) TARGET { return k < matrix.inputs ? _mm256_maskload_ps(from + k * matrix.input, there) : _mm256_setzero_ps(); };
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t first = 2 * g * groups.pairs, last = first + 2 * groups.pairs;
      __m256i most = _mm256_setzero_si256();
      for (int64_t k = first; k < last; ++k) most = _mm256_max_epu32(most, size_of(row(k)));
      __m256 inverse;
      const __m256 steps = steps_and_inverses(most, inverse);
      std::memcpy(steps_of(panel, groups, width) + g * width + r, &steps, kept);
      int32_t* to = panel + g * groups.pairs * width + r;
      for (int64_t k = first; k < last; k += 2, to += width) {
        const __m256i even = _mm256_and_si256(whole(row(k), inverse), _mm256_set1_epi32(0xffff)), odd = _mm256_slli_epi32(whole(row(k + 1), inverse), 16);
        const __m256i pairs = _mm256_or_si256(even, odd);
        // Lanes too many are written over by the next pairs; what takes a mask takes processors of AMD a dozen cycles.
        if (k + 2 < last) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pairs);
        } else {
          std::memcpy(to, &pairs, kept);
        }
      }
    }
  }
}

// Inputs side by side: one row after the other, eight inputs at once.
TARGET void pack_rows(const Matrix& matrix, int64_t width, int32_t* panel) {
  const Groups groups(matrix.inputs);
  std::memset(panel, 0, static_cast<size_t>(groups.words(width)) * sizeof(int32_t));
  for (int64_t r = 0; r < matrix.last - matrix.first; ++r) {
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t start = 2 * g * groups.pairs, count = std::max<int64_t>(0, std::min(2 * groups.pairs, matrix.inputs - start));
      const float* from = matrix.values + (matrix.first + r) * matrix.row + start;
      const auto eight = [&](int64_t k) TARGET { return k + 8 <= count ? _mm256_loadu_ps(from + k) : _mm256_maskload_ps(from + k, first_lanes(count - k)); };
      __m256i most = _mm256_setzero_si256();
      for (int64_t k = 0; k < count; k += 8) most = _mm256_max_epu32(most, size_of(eight(k)));
      most = _mm256_max_epu32(most, _mm256_permute2x128_si256(most, most, 1));
      most = _mm256_max_epu32(most, _mm256_shuffle_epi32(most, 0x4e));
      most = _mm256_max_epu32(most, _mm256_shuffle_epi32(most, 0xb1));
      __m256 inverse;
      const __m256 steps = steps_and_inverses(most, inverse);
      steps_of(panel, groups, width)[g * width + r] = _mm256_cvtss_f32(steps);
      int32_t* to = panel + g * groups.pairs * width + r;
      for (int64_t k = 0; k < count; k += 8) {
        // Low halves of eight numbers side by side: what is too large for 16 bits is what is not finite.
        const __m256i low = _mm256_and_si256(whole(eight(k), inverse), _mm256_set1_epi32(0xffff));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
        alignas(16) int32_t pairs[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(pairs), _mm256_castsi256_si128(packed));
        for (int64_t i = 0; i < std::min<int64_t>(4, (count - k + 1) / 2); ++i) to[(k / 2 + i) * width] = pairs[i];
      }
    }
  }
}

TARGET void pack(const Matrix& matrix, int64_t width, int32_t* panel) {
  if (matrix.row == 1 && matrix.input != 1) {
    pack_columns(matrix, width, panel);
  } else {
    pack_rows(matrix, width, panel);
  }
}

TARGET void product(const int32_t* left, const int32_t* right, const Groups& groups, float* total) {
  const float *of_left = steps_of(left, groups, kLeft), *of_right = steps_of(right, groups, kRight);
  std::fill(total, total + kLeft * kRight, 0.0F);
  for (int64_t g = 0; g < groups.count; ++g, of_left += kLeft, of_right += kRight) {
    __m256i sums[kLeft][kVectors];
#pragma GCC unroll 8
    for (int64_t m = 0; m < kLeft; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
    for (int64_t j = 0; j < groups.pairs; j += 2) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i, left += kLeft, right += kRight) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(right)), high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(right + 8));
#pragma GCC unroll 8
        for (int64_t m = 0; m < kLeft; ++m) {
          const __m256i pair = _mm256_set1_epi32(left[m]);
          sums[m][0] = _mm256_add_epi32(sums[m][0], _mm256_madd_epi16(pair, low));
          sums[m][1] = _mm256_add_epi32(sums[m][1], _mm256_madd_epi16(pair, high));
          // In this order: GCC 12 makes all products first, and has no registers left for the sums. Half as fast.
          asm volatile("" : "+x"(sums[m][0]), "+x"(sums[m][1]));
        }
      }
    }
    asm volatile("" ::: "memory");  // totals stay there: in registers from group to group, they would leave none for the sums
    const __m256 low = _mm256_loadu_ps(of_right), high = _mm256_loadu_ps(of_right + 8);
#pragma GCC unroll 8
    for (int64_t m = 0; m < kLeft; ++m) {
      const __m256 step = _mm256_set1_ps(of_left[m]);
      float* to = total + m * kRight;
      // One step after the other, as in int16.cpp.
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[m][0]), low), step, _mm256_loadu_ps(to)));
      _mm256_storeu_ps(to + 8, _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[m][1]), high), step, _mm256_loadu_ps(to + 8)));
    }
  }
}

}  // namespace

Functions avx2_functions() { return {pack, product}; }

}  // namespace bimos::int16
