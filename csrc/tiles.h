// Layouts of a plane for products: made when a model is loaded, never written to disk.
//
//   rows32   32 rows x 8 inputs are 32 bytes, a byte a row: the low nibble holds inputs 0-3, the high nibble 4-7.
//            Byte p belongs to row `row_of_byte(p)`: sums of 16 bits then widen to rows in order.
//   rows64   64 rows x 32 inputs are 256 bytes: 4 times 16 rows, 4 bytes a row; byte p of a row holds inputs 4p..4p+3 in its low
//            nibble and 16+4p..16+4p+3 in its high nibble.
//
// A row tile is all inputs of its rows, block by block. Where a plane has group scales, blocks are groups, and each is followed by
// the float16 scales of the tile's rows. Rows and inputs that only fill up the last tile are zero bits.
#pragma once

#include "level.h"

namespace bimos {

constexpr int64_t kBlock = 256;  // inputs a block where there are no group scales

inline int64_t rows_of(Layout layout) { return layout == Layout::rows64 ? 64 : 32; }
inline int64_t inputs_of_step(Layout layout) { return layout == Layout::rows64 ? 32 : 8; }
inline int64_t bytes_of_step(Layout layout) { return layout == Layout::rows64 ? 256 : 32; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of one row tile.
inline int64_t tile_bytes(Layout layout, const Plane& plane) {
  const int64_t scales = plane.grouped ? ceil_div(plane.in, plane.block) * rows_of(layout) * 2 : 0;
  return ceil_div(plane.in, inputs_of_step(layout)) * bytes_of_step(layout) + scales;
}

inline int64_t tile_count(Layout layout, int64_t out) { return ceil_div(out, rows_of(layout)); }

// Whether blocks of this many inputs are whole steps.
inline bool fits(Layout layout, int64_t in, int64_t block) { return block >= in || block % inputs_of_step(layout) == 0; }

inline int row_of_byte(int byte) {  // of rows32
  const int lane = byte / 2;
  return byte % 2 * 16 + lane;
}

// Writes a plane's tiles. `bits` are uint8 [out, in/8], `group_scales` float16 [out, in/block] or null.
void make_tiles(Layout layout, const uint8_t* bits, const uint16_t* group_scales, int64_t out, int64_t in, int64_t block, uint8_t* to);

}  // namespace bimos
