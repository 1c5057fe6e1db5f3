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

// A group's column, rounded, and its step.
float rounded_column(const Matrix& from, int64_t group, int64_t column, int8_t* codes) {
  const int64_t start = group * kGroup, count = std::min(kGroup, from.tokens - start);
  float values[kGroup] = {}, largest = 0;
  for (int64_t t = 0; t < count && column < from.width; ++t) {
    values[t] = std::bit_cast<float>(static_cast<uint32_t>(from.values[(start + t) * from.width + column]) << 16);
    largest = std::isfinite(values[t]) ? std::max(largest, std::fabs(values[t])) : kNaN;
    if (largest != largest) break;
  }
  const float inverse = largest > kLeast ? kMost / largest : 0.0F;
  for (int64_t t = 0; t < kGroup; ++t)
    codes[t] = largest == largest ? static_cast<int8_t>(std::nearbyint(static_cast<double>(values[t]) * inverse)) : int8_t{0};
  return largest / kMost;
}

void block(const Matrix& left, int64_t first, const Block& block) {
  for (int64_t g = 0; g < groups_of(left.tokens); ++g) {
    for (int64_t c = 0; c < kColumns; ++c) {
      int8_t codes[kGroup];
      block.steps[g * kColumns + c] = rounded_column(left, g, first + c, codes);
      for (int64_t t = 0; t < kGroup; ++t) block.bytes[(g * kGroup + t / 4 * 4) * kColumns + 4 * c + t % 4] = static_cast<uint8_t>(codes[t] + 128);
    }
  }
}

void tile(const Matrix& right, int64_t first, uint8_t* tile) {
  for (int64_t g = 0; g < groups_of(right.tokens); ++g, tile += kSteppedBytes) {
    for (int64_t r = 0; r < kRows; ++r) {
      int8_t codes[kGroup];
      const float step = rounded_column(right, g, first + r, codes);
      int32_t sum = 0;
      for (int64_t t = 0; t < kGroup; ++t) {
        tile[kRows * 4 + (t / 4 * kRows + r) * 4 + t % 4] = static_cast<uint8_t>(codes[t]);
        sum -= 128 * codes[t];
      }
      std::memcpy(tile + r * 4, &sum, 4);
      std::memcpy(tile + kGroupBytes + r * 4, &step, 4);
    }
  }
}

void outer(const uint8_t* tile, int64_t groups, const Block& block, int64_t rows, int64_t count, uint16_t* y, int64_t stride) {
  for (int64_t o = 0; o < rows; ++o) {
    float total[kRows] = {};
    const uint8_t* part = tile;
    for (int64_t g = 0; g < groups; ++g, part += kSteppedBytes) {
      int32_t sums[kRows];
      float steps[kRows];
      std::memcpy(sums, part, sizeof sums);
      std::memcpy(steps, part + kGroupBytes, sizeof steps);
      const auto* weight = reinterpret_cast<const int8_t*>(part + sizeof sums);
      for (int64_t t = 0; t < kGroup; ++t) {
        const int32_t value = block.bytes[(g * kGroup + t / 4 * 4) * kColumns + 4 * o + t % 4];
        for (int64_t r = 0; r < kRows; ++r) sums[r] += value * weight[(t / 4 * kRows + r) * 4 + t % 4];
      }
      for (int64_t r = 0; r < kRows; ++r) total[r] += static_cast<float>(sums[r]) * steps[r] * block.steps[g * kColumns + o];
    }
    for (int64_t r = 0; r < count; ++r) store(spread(total[r]), y + o * stride + r, 1);
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
  if (is_avx512(level)) return avx512_functions();
#endif
  return {prepare, product, block, tile, outer};
}

}  // namespace bimos::group8
