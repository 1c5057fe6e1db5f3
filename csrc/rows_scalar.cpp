// Rows of integers in plain C++: sums in float32.
#include <cstring>

#include "rows.h"
#include "tiles.h"

namespace bimos {
namespace {

size_t int8_bytes(int64_t n) { return static_cast<size_t>(ceil_div(n, 16)) * 16 * sizeof(float); }

void int8_prepare(const float* x, int64_t n, uint8_t* prepared) { std::memcpy(prepared, x, static_cast<size_t>(n) * sizeof(float)); }

void int8(const int8_t* weight, int64_t rows, int64_t n, const uint8_t* const* prepared, int tokens, float* const* y) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int t = 0; t < tokens; ++t) {
      const auto* x = reinterpret_cast<const float*>(prepared[t]);
      float sums[8] = {};
      for (int64_t j = 0; j < n; ++j) sums[j % 8] += x[j] * static_cast<float>(weight[r * n + j]);
      y[t][r] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
  }
}

}  // namespace

const Rows& scalar_rows() {
  static const Rows rows{int8_bytes, int8_prepare, int8};
  return rows;
}

}  // namespace bimos
