// Rows of 4-bit integers, made when a model is loaded, never written to disk: w ~ scale * (code - zero), a scale for every 32 inputs.
//
// A tile is 16 rows: for every 32 inputs 256 bytes of codes, then for every 32 inputs 16 scales, then zeros up to a multiple of 64 bytes.
// Codes are 4 times 16 rows, 4 bytes a row: byte p of part q holds input 8q+p in its low nibble and 8q+4+p in its high nibble.
// A scale is a float16 whose lowest four bits are the zero point instead.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bimos {

constexpr int64_t kGroup = 32;     // inputs that share a scale
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileGroup = kGroup / 2 * kTileRows;  // bytes of a tile's codes of one group

inline int64_t int4_groups(int64_t n) { return (n + kGroup - 1) / kGroup; }
inline int64_t int4_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t int4_tile_bytes(int64_t n) { return (int4_groups(n) * (kTileGroup + kTileRows * 2) + 63) / 64 * 64; }

// A token's values for `Rows::int4`, the same at every level: for each group 32 high and 32 low bytes, both signed, of 16-bit
// integers; then the groups' scales; then the groups' sums of those integers, which zero points are multiplied with.
size_t int4_bytes(int64_t n);  // a multiple of 64
void int4_prepare(const float* x, int64_t n, uint8_t* prepared);

inline const float* int4_scales(const uint8_t* prepared, int64_t n) { return reinterpret_cast<const float*>(prepared + int4_groups(n) * 64); }
inline const float* int4_sums(const uint8_t* prepared, int64_t n) { return int4_scales(prepared, n) + int4_groups(n); }

// Writes one tile of count <= 16 rows of n values, at the speed of the level of this name. Scales and zero points are searched for the
// least squared error, each input's times its weight. Values should be of the size of 1 to 1000: scales below 2^-14 are 0.
void int4_pack(const char* level, const float* values, const float* weight, int64_t count, int64_t n, uint8_t* tile);

}  // namespace bimos
