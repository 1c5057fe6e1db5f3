// Products of float32 matrices in whole numbers of 16 bits, for training on processors with AVX2 alone (bimos/training/integers.py, bimos/methods/ste.py): a
// multiply-add of 16 pairs of numbers takes as long as one of 8 floats.
//
//   y[m, n] = sum_g step[m, g] step'[n, g] sum_{k in g} a[m, k] b[n, k] + bias[n]
//
// Groups g are as many as have at most 128 inputs each, all alike. a and b are whole numbers from -4095 to 4095, rounded to nearest, ties
// to even; step[m, g] = max |row m, k in g| / 4095. Sums within a group are exact (128 * 4095^2 < 2^31), those over groups float32. A
// group with a value that is not finite has a step of NaN.
//
// A panel is 5 rows of the left side or 16 of the right one: for every group, for every two inputs, the rows' pairs of numbers; behind
// all groups their steps, as many as rows a group. Rows and inputs that only fill up a panel are zeros.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace bimos::int16 {

constexpr int64_t kLeft = 5, kRight = 16;  // rows of a panel: of 10 vectors of sums, the most that leave registers for what is multiplied
constexpr int64_t kGroup = 128;            // inputs at most
constexpr float kMost = 4095;              // of the whole numbers
constexpr float kLeast = 1e-30F;           // below, all is next to nothing, and its inverse might not be finite

// How inputs are divided.
struct Groups {
  explicit Groups(int64_t inputs) : count(ceil_div(inputs, kGroup)), pairs(count > 0 ? 2 * ceil_div(inputs, 4 * count) : 0) {}
  int64_t count, pairs;  // pairs of each, an even number

  int64_t words(int64_t width) const { return count * (pairs + 1) * width; }  // of a panel
};

// Rows [first, last) of a matrix [rows, inputs], each `row` values behind the one before it, each input `input` values; one of both is 1.
struct Matrix {
  const float* values;
  int64_t inputs, first, last, row, input;
};

struct Functions {
  // The matrix's rows, no more than `width`, as a panel of that width.
  void (*pack)(const Matrix& matrix, int64_t width, int32_t* panel);
  // total [5, 16] of two panels.
  void (*product)(const int32_t* left, const int32_t* right, const Groups& groups, float* total);
};

// For a level of level.h by its name.
Functions functions_for(const char* level);

// A panel's steps.
inline float* steps_of(int32_t* panel, const Groups& groups, int64_t width) { return reinterpret_cast<float*>(panel + groups.count * groups.pairs * width); }
inline const float* steps_of(const int32_t* panel, const Groups& groups, int64_t width) {
  return reinterpret_cast<const float*>(panel + groups.count * groups.pairs * width);
}

}  // namespace bimos::int16
