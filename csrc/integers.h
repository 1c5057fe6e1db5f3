// Rows as int8 with a scale each, and what products of such rows say: for a frozen model's products in training
// (bimos/training/int8_products.py).
#pragma once

#include <cstdint>

namespace bimos::integers {

struct Rows {
  const void* x;  // [rows, n], float32 or bfloat16
  int8_t* out;    // [rows, n]: x / scale, to the nearest
  float* scale;   // [rows]: the largest of a row is 127
  int64_t n;
};

struct Sums {
  const int32_t* sums;         // [rows, n]
  const float *row, *column;   // scales [rows], [n]
  const float* bias;           // [n] or null
  void* out;                   // [rows, n], float32 or bfloat16: sums * row * column + bias
  int64_t n;
};

struct Functions {
  void (*round)(const Rows& rows, int64_t first, int64_t last);  // rows [first, last)
  void (*scale)(const Sums& sums, int64_t first, int64_t last);
};

// For a level of level.h by its name, and values that are float32, else bfloat16.
Functions functions_for(const char* level, bool is_float);

}  // namespace bimos::integers
