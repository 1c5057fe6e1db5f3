#include "int4.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "targets.h"

namespace bimos {
namespace {

constexpr float kLargest = 32512;       // 127 * 256: high bytes stay signed when they are rounded up
constexpr float kSmallest = 0x1p-14F;   // of float16 with all its bits
constexpr int kRanges = 12;             // that are tried: from 0.7 to 1.05 times that of the values
constexpr int kLanes = static_cast<int>(kTileRows);

// To the nearest integer, even where two are; below 2^22.
BIMOS_INLINE float rounded(float value) { return (value + 12582912.0F) - 12582912.0F; }

BIMOS_INLINE float code_of(float value, float inverse, float zero) {
  const float code = rounded(value * inverse) + zero;
  return code > 0.0F ? (code < 15.0F ? code : 15.0F) : 0.0F;  // NaN: 0
}

// Scales and zero points of 16 rows' groups.
struct Fit {
  float scale[kLanes], zero[kLanes];
};

// For each row the scale and zero point that give the least squared error. w [input][row], weight [input].
BIMOS_INLINE void fit(const float (*w)[kLanes], const float* weight, Fit& best) {
  float low[kLanes] = {}, high[kLanes] = {}, error[kLanes] = {};  // error: less that of all zeros
  for (int64_t j = 0; j < kGroup; ++j) {
#pragma omp simd
    for (int r = 0; r < kLanes; ++r) {
      low[r] = w[j][r] < low[r] ? w[j][r] : low[r];
      high[r] = w[j][r] > high[r] ? w[j][r] : high[r];
    }
  }
  best = {};
  for (int k = 0; k < kRanges; ++k) {
    const float share = 0.7F + 0.35F / (kRanges - 1) * static_cast<float>(k);
    float inverse[kLanes], zero[kLanes], squares[kLanes] = {}, products[kLanes] = {};
#pragma omp simd
    for (int r = 0; r < kLanes; ++r) {
      const float range = high[r] - low[r];
      inverse[r] = range > kSmallest ? 15.0F / (range * share) : 0.0F;
      const float start = rounded(-(low[r] + range * (1.0F - share) / 2) * inverse[r]);
      zero[r] = start > 0.0F ? (start < 15.0F ? start : 15.0F) : 0.0F;
    }
    for (int64_t j = 0; j < kGroup; ++j) {
#pragma omp simd
      for (int r = 0; r < kLanes; ++r) {
        const float value = code_of(w[j][r], inverse[r], zero[r]) - zero[r];
        squares[r] += weight[j] * value * value;
        products[r] += weight[j] * value * w[j][r];
      }
    }
#pragma omp simd
    for (int r = 0; r < kLanes; ++r) {
      const float exact = squares[r] > 0.0F ? products[r] / squares[r] : 0.0F;
      // As it will be stored: six bits behind the first.
      float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(exact) + 0x10000) & 0xfffe0000);
      scale = scale < kSmallest ? 0.0F : scale;
      const float off = scale * (scale * squares[r] - 2 * products[r]);
      const bool better = off < error[r];
      error[r] = better ? off : error[r];
      best.scale[r] = better ? scale : best.scale[r];
      best.zero[r] = better ? zero[r] : best.zero[r];
    }
  }
}

BIMOS_INLINE void pack(const float* values, const float* weight, int64_t count, int64_t n, uint8_t* tile) {
  const int64_t groups = int4_groups(n);
  std::memset(tile, 0, static_cast<size_t>(int4_tile_bytes(n)));
  for (int64_t g = 0; g < groups; ++g) {
    float w[kGroup][kLanes] = {}, factors[kGroup] = {};
    std::copy(weight + g * kGroup, weight + std::min(n, (g + 1) * kGroup), factors);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < std::min(kGroup, n - g * kGroup); ++j) w[j][r] = values[r * n + g * kGroup + j];
    Fit best;
    fit(w, factors, best);
    uint8_t* codes = tile + g * kTileGroup;
    for (int64_t j = 0; j < kGroup; ++j) {
      uint8_t* part = codes + j / 8 * (4 * kTileRows) + j % 4;
      for (int64_t r = 0; r < kTileRows; ++r) {
        const float inverse = best.scale[r] > 0.0F ? 1.0F / best.scale[r] : 0.0F;
        part[4 * r] |= static_cast<uint8_t>(static_cast<int>(code_of(w[j][r], inverse, best.zero[r])) << (j / 4 % 2 * 4));
      }
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
      // float16 of a value that it holds: its bits, with another bias of the exponent.
      const uint32_t half = best.scale[r] > 0.0F ? (std::bit_cast<uint32_t>(best.scale[r]) >> 13) - (112U << 10) : 0;
      const auto stored = static_cast<uint16_t>(half | static_cast<uint32_t>(best.zero[r]));
      std::memcpy(tile + groups * kTileGroup + (g * kTileRows + r) * 2, &stored, 2);
    }
  }
}

}  // namespace

void int4_pack(const char* level, const float* values, const float* weight, int64_t count, int64_t n, uint8_t* tile) {
  pick<pack>(level)(values, weight, count, n, tile);
}

size_t int4_bytes(int64_t n) {
  return (static_cast<size_t>(int4_groups(n)) * (64 + 2 * sizeof(float)) + 63) / 64 * 64;
}

void int4_prepare(const float* x, int64_t n, uint8_t* prepared) {
  const int64_t groups = int4_groups(n);
  auto* scales = reinterpret_cast<float*>(prepared + groups * 64);
  float* sums = scales + groups;
  for (int64_t g = 0; g < groups; ++g) {
    float values[kGroup] = {}, largest = 0, strange = 0;
    std::copy(x + g * kGroup, x + std::min(n, (g + 1) * kGroup), values);
    for (const float value : values) {
      largest = std::max(largest, std::fabs(value));
      strange += value - value;  // NaN where any value is not finite
    }
    const float inverse = strange == 0 && largest > 0 ? kLargest / largest : 0.0F;
    int32_t sum = 0;
    for (int64_t j = 0; j < kGroup; ++j) {
      const int32_t whole = strange == 0 ? static_cast<int32_t>(std::lrint(values[j] * inverse)) : 0;
      const int32_t high = (whole + 128) >> 8;
      prepared[g * 64 + j] = static_cast<uint8_t>(static_cast<int8_t>(high));
      prepared[g * 64 + kGroup + j] = static_cast<uint8_t>(static_cast<int8_t>(whole - 256 * high));
      sum += whole;
    }
    scales[g] = largest / kLargest + strange;
    sums[g] = static_cast<float>(sum);
  }
}

}  // namespace bimos
