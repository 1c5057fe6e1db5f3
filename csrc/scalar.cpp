// The level that every processor has: plain C++, sums in float32, exact tables.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tiles.h"

namespace bimos {
namespace {

using c10::BFloat16;
using c10::Half;

float half(uint16_t bits) { return static_cast<float>(Half(bits, Half::from_bits())); }

void load(const void* from, Dtype dtype, int64_t n, float* to) {
  switch (dtype) {
    case Dtype::float32: std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float)); return;
    case Dtype::bfloat16: std::copy_n(static_cast<const BFloat16*>(from), n, to); return;
    case Dtype::float16: std::copy_n(static_cast<const Half*>(from), n, to); return;
  }
}

void store(const float* from, Dtype dtype, int64_t n, void* to) {
  switch (dtype) {
    case Dtype::float32: std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float)); return;
    case Dtype::bfloat16: std::copy_n(from, n, static_cast<BFloat16*>(to)); return;
    case Dtype::float16: std::copy_n(from, n, static_cast<Half*>(to)); return;
  }
}

void dots(const float* x, const uint16_t* rows, int64_t count, int64_t n, float* out) {
  for (int64_t r = 0; r < count; ++r) {
    float sums[8] = {};  // in parallel: less rounding, and room for the compiler
    for (int64_t j = 0; j < n; ++j) sums[j % 8] += x[j] * half(rows[r * n + j]);
    out[r] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
}

void mix(const float* x, const float* gate, const uint16_t* rows, int64_t count, int64_t stride, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) {
    float scale = 0;
    for (int64_t e = 0; e < count; ++e) scale += gate[e] * half(rows[e * stride + j]);
    out[j] = x[j] * scale;
  }
}

// 16 float32 sums for every 4 inputs.
size_t table_bytes(int64_t in) { return static_cast<size_t>(ceil_div(in, 32) * 32 / 4) * 16 * sizeof(float); }

void build(const float* x, const Plane& plane, uint8_t* tables, float* scales) {
  auto* table = reinterpret_cast<float*>(tables);
  for (int64_t start = 0; start < plane.in; start += plane.block) {
    const int64_t end = std::min(plane.in, start + plane.block);
    float strange = 0, most = 0;  // `strange` is NaN where any input of the block is not finite
    for (int64_t j = start; j < end; ++j) strange += x[j] - x[j];
    for (int64_t j = start; j < end; j += 4) most = std::max(most, std::fabs(x[j]) + std::fabs(x[j + 1]) + std::fabs(x[j + 2]) + std::fabs(x[j + 3]));
    const float step = plane.int8 ? most / 127 : 1, inverse = most > 1e-30F ? 127 / most : 0;
    *scales++ = step + strange;
    for (int64_t j = start; j < end; j += 4, table += 16) {
      for (int index = 0; index < 16; ++index) {
        float sum = 0;
        for (int bit = 0; bit < 4; ++bit) sum += (index >> bit & 1) != 0 ? x[j + bit] : -x[j + bit];
        table[index] = plane.int8 ? std::nearbyint(sum * inverse) : sum;
      }
    }
  }
}

void product(const Plane& plane, int64_t first, int64_t last, const uint8_t* const* tables, const float* const* scales, int tokens,
             float* y, int64_t stride) {
  const int64_t bytes = tile_bytes(Layout::rows32, plane);
  for (int t = 0; t < tokens; ++t) {
    for (int64_t tile = first; tile < last; ++tile) {
      const uint8_t* data = plane.data + tile * bytes;
      const auto* table = reinterpret_cast<const float*>(tables[t]);
      float total[32] = {};
      for (int64_t start = 0; start < plane.in; start += plane.block) {
        float sums[32] = {};
        const int64_t end = std::min(plane.in, start + plane.block);
        for (int64_t j = start; j < end; j += 8, table += 32, data += 32) {
          for (int p = 0; p < 32; ++p) sums[p] += table[data[p] & 0xf] + table[16 + (data[p] >> 4)];
        }
        for (int p = 0; p < 32; ++p) {
          uint16_t scale = 0;
          if (plane.grouped) std::memcpy(&scale, data + 2 * row_of_byte(p), 2);
          total[p] += scales[t][start / plane.block] * (plane.grouped ? half(scale) * sums[p] : sums[p]);
        }
        if (plane.grouped) data += 64;
      }
      for (int p = 0; p < 32; ++p) y[t * stride + tile * 32 + row_of_byte(p)] = total[p];
    }
  }
}

}  // namespace

const Level& scalar_level() {
  static const Level level{"scalar", Layout::rows32, load, store, dots, mix, table_bytes, build, product, scalar_rows()};
  return level;
}

}  // namespace bimos
