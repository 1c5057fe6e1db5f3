#include "tiles.h"

#include <algorithm>
#include <cstring>

namespace bimos {
namespace {

// Four nibbles, each in a byte of its own.
inline uint32_t spread(uint32_t bits) {
  bits = (bits | bits << 8) & 0x00ff00ff;
  return (bits | bits << 4) & 0x0f0f0f0f;
}

void step_rows32(const uint8_t* bits, int64_t first_row, int64_t out, int64_t in, int64_t input, uint8_t* to) {
  for (int byte = 0; byte < 32; ++byte) {
    const int64_t row = first_row + row_of_byte(byte);
    to[byte] = row < out ? bits[row * (in / 8) + input / 8] : 0;
  }
}

void step_rows64(const uint8_t* bits, int64_t first_row, int64_t out, int64_t in, int64_t input, uint8_t* to) {
  for (int64_t r = 0; r < 64; ++r) {
    uint8_t* bytes = to + r * 4;
    const int64_t row = first_row + r;
    if (row >= out) {
      std::memset(bytes, 0, 4);
      continue;
    }
    const uint8_t* source = bits + row * (in / 8) + input / 8;
    const int64_t there = std::min<int64_t>(4, (in - input) / 8);
    uint32_t signs = 0;
    for (int64_t b = 0; b < there; ++b) signs |= uint32_t{source[b]} << 8 * b;
    const uint32_t nibbles = spread(signs & 0xffff) | spread(signs >> 16) << 4;
    for (int p = 0; p < 4; ++p) bytes[p] = static_cast<uint8_t>(nibbles >> 8 * p);
  }
}

}  // namespace

void make_tiles(Layout layout, const uint8_t* bits, const uint16_t* group_scales, int64_t out, int64_t in, int64_t block, uint8_t* to) {
  const int64_t rows = rows_of(layout), step = inputs_of_step(layout), groups = ceil_div(in, block);
  for (int64_t first = 0; first < out; first += rows) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t end = std::min(in, (group + 1) * block);
      for (int64_t input = group * block; input < end; input += step) {
        (layout == Layout::rows64 ? step_rows64 : step_rows32)(bits, first, out, in, input, to);
        to += bytes_of_step(layout);
      }
      if (group_scales == nullptr) continue;
      for (int64_t r = 0; r < rows; ++r, to += 2) {
        const uint16_t scale = first + r < out ? group_scales[(first + r) * groups + group] : uint16_t{0};
        std::memcpy(to, &scale, 2);
      }
    }
  }
}

}  // namespace bimos
