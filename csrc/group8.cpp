// Packing, and the product in plain C++.
#include "group8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "group8_avx512.h"
#include "vectors.h"

namespace bimos::group8 {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void prepare(const uint16_t* x, int64_t in, int64_t first, int64_t last, const Values& values) {
  const int64_t groups = groups_of(in);
  for (int64_t i = first * groups; i < last * groups; ++i) {
    const int64_t start = i % groups * kGroup, count = std::min(kGroup, in - start);
    float group[kGroup] = {}, largest = 0;
    for (int64_t j = 0; j < count; ++j) {
      group[j] = std::bit_cast<float>(static_cast<uint32_t>(x[i / groups * in + start + j]) << 16);
      largest = std::isfinite(group[j]) ? std::max(largest, std::fabs(group[j])) : kNaN;
      if (largest != largest) break;
    }
    const float inverse = largest > kLeast ? kMost / largest : 0.0F;
    values.steps[i] = largest / kMost;
    for (int64_t j = 0; j < kGroup; ++j)  // a double holds the product as it is, as one multiply-add does
      values.bytes[i * kGroup + j] = largest == largest ? static_cast<uint8_t>(std::nearbyint(static_cast<double>(group[j]) * inverse) + 128) : 0;
  }
}

void product(const Weights& weights, int64_t tile, const Values& values, int64_t first, int64_t last, uint16_t* y) {
  const int64_t groups = groups_of(weights.in), count = std::min(kRows, weights.out - tile * kRows);
  for (int64_t t = first; t < last; ++t) {
    const uint8_t* part = weights.tiles + tile * tile_bytes(weights.in);
    float total[kRows] = {};
    for (int64_t g = 0; g < groups; ++g, part += kGroupBytes) {
      int32_t sums[kRows];
      std::memcpy(sums, part, sizeof sums);
      const uint8_t* bytes = values.bytes + (t * groups + g) * kGroup;
      const auto* weight = reinterpret_cast<const int8_t*>(part + sizeof sums);
      for (int64_t j = 0; j < kGroup; ++j)
        for (int64_t r = 0; r < kRows; ++r) sums[r] += bytes[j] * weight[(j / 4 * kRows + r) * 4 + j % 4];
      for (int64_t r = 0; r < kRows; ++r) total[r] += values.steps[t * groups + g] * static_cast<float>(sums[r]);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = tile * kRows + r;
      store(spread(total[r] * weights.scale[row] + (weights.bias == nullptr ? 0.0F : weights.bias[row])), y + t * weights.out + row, 1);
    }
  }
}

}  // namespace

void pack(const float* rows, int64_t count, int64_t n, uint8_t* tile, float* scale) {
  std::memset(tile, 0, static_cast<size_t>(tile_bytes(n)));
  for (int64_t r = 0; r < count; ++r) {
    const float* row = rows + r * n;
    float largest = 0;
    for (int64_t j = 0; j < n; ++j) largest = std::isfinite(row[j]) ? std::max(largest, std::fabs(row[j])) : kNaN;
    scale[r] = largest / kMost;
    const float inverse = largest > kLeast ? kMost / largest : 0.0F;  // 0 for NaN: its scale says all
    for (int64_t g = 0; g < groups_of(n); ++g) {
      uint8_t* part = tile + g * kGroupBytes;
      int32_t sum = 0;
      for (int64_t j = 0; j < kGroup && g * kGroup + j < n && inverse > 0; ++j) {
        const auto code = static_cast<int8_t>(std::nearbyint(static_cast<double>(row[g * kGroup + j]) * inverse));
        part[kRows * 4 + (j / 4 * kRows + r) * 4 + j % 4] = static_cast<uint8_t>(code);
        sum -= 128 * code;
      }
      std::memcpy(part + r * 4, &sum, 4);
    }
  }
}

Functions functions_for([[maybe_unused]] const char* level) {
#ifdef BIMOS_X86
  if (std::strcmp(level, "avx512") == 0) return avx512_functions();
#endif
  return {prepare, product};
}

}  // namespace bimos::group8
