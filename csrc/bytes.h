// Products with rows of bytes, as heads have, by the matrix unit (amx.h): they lie in memory as its right sides, strip after strip of 64 rows, depth
// after depth of 64 inputs, four right sides each. Rows and inputs that only fill up the last ones are zeros. Up to four tokens are multiplied by
// vectors: memory bounds both, and where other programs share it the matrix unit may run at a quarter of its speed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bimos::bytes {

constexpr int64_t kStrip = 64;  // rows
constexpr int64_t kMost = 128;  // tokens at a time

size_t tile_bytes(int64_t rows, int64_t n);

// Strips [first, last) of int8 rows of n.
void make_tiles(const int8_t* from, int64_t rows, int64_t n, int64_t first, int64_t last, uint8_t* to);

// y[t][r - first] = scale[r] sum_j w[r, j] x[t, j] for t < tokens <= kMost, and rows [first, last), `first` a multiple of kStrip; float32 x, `stride` values
// from token to token. As precise as products with signs of 16 bits (matrices.h).
void product(const uint8_t* tiles, const float* scale, int64_t n, int64_t first, int64_t last, const float* x, int64_t stride, int64_t tokens,
             float* const* y);

}  // namespace bimos::bytes
