// The products in plain C++.
#include "int16.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "int16_avx2.h"

namespace bimos::int16 {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void pack(const Matrix& matrix, int64_t width, int32_t* panel) {
  const Groups groups(matrix.inputs);
  const int64_t inputs = 2 * groups.pairs;
  std::memset(panel, 0, static_cast<size_t>(groups.words(width)) * sizeof(int32_t));
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t start = g * inputs, count = std::max<int64_t>(0, std::min(inputs, matrix.inputs - start));
    for (int64_t r = 0; r < matrix.last - matrix.first; ++r) {
      const float* from = matrix.values + (matrix.first + r) * matrix.row + start * matrix.input;
      float largest = 0;
      for (int64_t k = 0; k < count && largest == largest; ++k) {
        const float value = from[k * matrix.input];
        largest = std::isfinite(value) ? std::max(largest, std::fabs(value)) : kNaN;
      }
      steps_of(panel, groups, width)[g * width + r] = largest / kMost;
      const float inverse = largest > kLeast ? kMost / largest : 0.0F;  // 0 for NaN: its step says all
      auto* pairs = reinterpret_cast<int16_t*>(panel + g * groups.pairs * width + r);
      for (int64_t k = 0; k < count && inverse > 0; ++k) {
        const float whole = std::nearbyint(from[k * matrix.input] * inverse);
        pairs[k / 2 * 2 * width + k % 2] = static_cast<int16_t>(whole);
      }
    }
  }
}

void product(const int32_t* left, const int32_t* right, const Groups& groups, float* total) {
  const float *of_left = steps_of(left, groups, kLeft), *of_right = steps_of(right, groups, kRight);
  std::fill(total, total + kLeft * kRight, 0.0F);
  for (int64_t g = 0; g < groups.count; ++g, of_left += kLeft, of_right += kRight) {
    int32_t sums[kLeft][kRight] = {};
    for (int64_t j = 0; j < groups.pairs; ++j, left += kLeft, right += kRight) {
      int16_t a[kLeft][2], b[kRight][2];
      std::memcpy(a, left, sizeof a);
      std::memcpy(b, right, sizeof b);
      for (int64_t m = 0; m < kLeft; ++m)
        for (int64_t n = 0; n < kRight; ++n) sums[m][n] += a[m][0] * b[n][0] + a[m][1] * b[n][1];
    }
    // One step after the other: their product could be too small or too large for a float where the sum's is not.
    for (int64_t m = 0; m < kLeft; ++m)
      for (int64_t n = 0; n < kRight; ++n) total[m * kRight + n] += static_cast<float>(sums[m][n]) * of_right[n] * of_left[m];
  }
}

}  // namespace

Functions functions_for([[maybe_unused]] const char* level) {
#ifdef BIMOS_X86
  if (std::strcmp(level, "scalar") != 0) return avx2_functions();
#endif
  return {pack, product};
}

}  // namespace bimos::int16
