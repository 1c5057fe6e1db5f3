#include "tiles.h"

#include <algorithm>
#include <cstring>

namespace bimos {
namespace {

// The four bits of inputs 4*nibble.. of a row.
inline uint8_t nibble_of(const uint8_t* row, int64_t in, int64_t nibble) {
  if (nibble * 4 >= in) return 0;
  return static_cast<uint8_t>(row[nibble / 2] >> (nibble % 2 * 4) & 0xf);
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
    const uint8_t* source = bits + row * (in / 8);
    for (int64_t p = 0; p < 4; ++p) {
      const uint8_t low = nibble_of(source, in, input / 4 + p);
      const uint8_t high = nibble_of(source, in, input / 4 + 4 + p);
      bytes[p] = static_cast<uint8_t>(low | high << 4);
    }
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
