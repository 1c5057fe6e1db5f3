// Rows of integers in plain C++.
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "int4.h"
#include "rows.h"
#include "tiles.h"

namespace bimos {
namespace {

using c10::Half;

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

float half(uint16_t bits) { return static_cast<float>(Half(bits, Half::from_bits())); }

void int4(const uint8_t* tiles, int64_t rows, int64_t n, const uint8_t* const* prepared, int tokens, float* const* y) {
  const int64_t groups = int4_groups(n);
  for (int64_t first = 0; first < rows; first += kTileRows, tiles += int4_tile_bytes(n)) {
    for (int t = 0; t < tokens; ++t) {
      float total[kTileRows] = {};
      for (int64_t g = 0; g < groups; ++g) {
        const auto* high = reinterpret_cast<const int8_t*>(prepared[t] + g * 64);
        int32_t value[kGroup];
        for (int64_t j = 0; j < kGroup; ++j) value[j] = 256 * high[j] + high[kGroup + j];
        for (int64_t r = 0; r < kTileRows; ++r) {
          int32_t sum = 0;
          for (int64_t q = 0; q < kGroup / 8; ++q) {
            const uint8_t* codes = tiles + g * kTileGroup + (q * kTileRows + r) * 4;
            for (int64_t p = 0; p < 4; ++p) sum += (codes[p] & 0xf) * value[8 * q + p] + (codes[p] >> 4) * value[8 * q + 4 + p];
          }
          uint16_t scale = 0;
          std::memcpy(&scale, tiles + groups * kTileGroup + (g * kTileRows + r) * 2, 2);
          const float centred = static_cast<float>(sum) - static_cast<float>(scale & 0xf) * int4_sums(prepared[t], n)[g];
          total[r] += half(scale & 0xfff0) * int4_scales(prepared[t], n)[g] * centred;
        }
      }
      std::copy_n(total, std::min(kTileRows, rows - first), y[t] + first);
    }
  }
}

}  // namespace

const Rows& scalar_rows() {
  static const Rows rows{int8_bytes, int8_prepare, int8, int4};
  return rows;
}

}  // namespace bimos
