// Products of bfloat16 values with frozen weights of 8 bits, for the teacher in training (bimos/training/integers.py).
//
//   y[t, r] = scale[r] sum_g step[t, g] sum_{j in g} q[t, j] w[r, j] + bias[r]
//
// Groups g are 64 inputs. q and w are whole numbers from -127 to 127; step[t, g] = max |x[t, j in g]| / 127, scale[r] = max |row r| / 127.
// Sums within a group are exact, those over groups float32. A group with a value that is not finite has a step of NaN.
//
// A tile is 48 rows: for every group 48 int32, -128 times the sum of each row's weights, then for every four inputs the rows' weights, four
// bytes a row. The sums take off what the values' bytes, q + 128, have too much. Rows and inputs that only fill up a tile are zeros.
//
// And products of two matrices of bfloat16 over their tokens, for gradients of weights (bimos/methods/ste.py):
//
//   y[o, i] = sum_g step[g, o] step'[g, i] sum_{t in g} p[t, o] q[t, i]
//
// where groups are 64 tokens, and both sides are rounded as values are, a step for every column of a group. The right side makes tiles of
// 48 columns, each group with its 48 steps behind it; the left one blocks of 16 columns.
#pragma once

#include <cstdint>

namespace bimos::group8 {

constexpr int64_t kGroup = 64, kRows = 48;
constexpr float kMost = 127;      // of the whole numbers
constexpr float kLeast = 1e-30F;  // below, all is next to nothing, and its inverse might not be finite
constexpr int64_t kGroupBytes = kRows * 4 + kRows * kGroup;  // of a tile

inline int64_t groups_of(int64_t in) { return (in + kGroup - 1) / kGroup; }
inline int64_t tiles_of(int64_t out) { return (out + kRows - 1) / kRows; }
inline int64_t tile_bytes(int64_t in) { return groups_of(in) * kGroupBytes; }

struct Weights {
  const uint8_t* tiles;
  const float* scale;
  const float* bias;  // or null
  int64_t in, out;
};

constexpr int64_t kColumns = 16;                              // of a block
constexpr int64_t kSteppedBytes = kGroupBytes + kRows * 4;    // of a group in a tile of columns

// Tokens as `prepare` leaves them: bytes [tokens, 64 groups] and steps [tokens, groups].
struct Values {
  uint8_t* bytes;
  float* steps;
  int64_t tokens;
};

// A matrix [tokens, width] of bfloat16.
struct Matrix {
  const uint16_t* values;
  int64_t tokens, width;
};

// Sixteen columns as `block` leaves them: for every group and every four tokens four bytes a column, and steps [groups, 16].
struct Block {
  uint8_t* bytes;
  float* steps;
};

struct Functions {
  // Tokens [first, last) of x [tokens, in].
  void (*prepare)(const uint16_t* x, int64_t in, int64_t first, int64_t last, const Values& values);
  // Rows of one tile of y [tokens, out], for tokens [first, last).
  void (*product)(const Weights& weights, int64_t tile, const Values& values, int64_t first, int64_t last, uint16_t* y);
  // Columns from `first` on, as many as there are or fit: of the left side, of the right side.
  void (*block)(const Matrix& left, int64_t first, const Block& block);
  void (*tile)(const Matrix& right, int64_t first, uint8_t* tile);
  // `rows` <= 16 rows of y, `count` <= 48 values of each, `stride` apart.
  void (*outer)(const uint8_t* tile, int64_t groups, const Block& block, int64_t rows, int64_t count, uint16_t* y, int64_t stride);
};

// For a level of level.h by its name.
Functions functions_for(const char* level);

// One tile of count <= 48 rows of n values, and their scales.
void pack(const float* rows, int64_t count, int64_t n, uint8_t* tile, float* scale);

}  // namespace bimos::group8
