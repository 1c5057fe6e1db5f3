// An instruction level: the functions that a product with signs is made of, once for every kind of processor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.h"

namespace bimos {

enum class Dtype { float32, bfloat16, float16 };

// How the rows of a plane lie in memory (tiles.h).
enum class Layout { rows32, rows64 };

constexpr int kTokens = 4;  // that a product by tables takes at a time

// A plane in its tiles.
struct Plane {
  const uint8_t* data;
  int64_t in;       // inputs, a multiple of 8
  int64_t block;    // inputs that share a scale of the tables, and a scale of the row where `grouped`
  bool grouped;     // whether every block of a row tile is followed by its rows' float16 scales
  bool int8;        // whether sums of four inputs (by matrices, inputs) are rounded to 8 bits, 127 being the largest of their block; else to 16
};

struct Level {
  const char* name;
  Layout layout;

  // `n` values of any dtype to float32, and back (rounded to nearest even).
  void (*load)(const void* from, Dtype dtype, int64_t n, float* to);
  void (*store)(const float* from, Dtype dtype, int64_t n, void* to);

  // out[r] = sum_j x[j] rows[r, j] for r < count; float16 rows of n.
  void (*dots)(const float* x, const uint16_t* rows, int64_t count, int64_t n, float* out);

  // out[j] = x[j] * sum_e gate[e] rows[e, j]; float16 rows of n, `stride` values from one to the next. `out` may be `x`.
  void (*mix)(const float* x, const float* gate, const uint16_t* rows, int64_t count, int64_t stride, int64_t n, float* out);

  // The tables of one token. `x` holds zeros up to the next multiple of 32. `scales`: one per block.
  size_t (*table_bytes)(int64_t in);
  void (*build)(const float* x, const Plane& plane, uint8_t* tables, float* scales);

  // y[t, r] = sum_j sign[r, j] x[t, j] for t < tokens <= kTokens and the rows of row tiles [first, last).
  // `y` has `stride` floats a token, no fewer than there are rows; nothing is known of its alignment.
  void (*product)(const Plane& plane, int64_t first, int64_t last, const uint8_t* const* tables, const float* const* scales, int tokens,
                  float* y, int64_t stride);

  const Rows& rows;
  bool has_matrices = false;  // many tokens go by the matrix unit (matrices.h)
};

const Level& scalar_level();
#ifdef BIMOS_X86
const Level& avx2_level();
const Level& avx512_level();
const Level& amx_level();  // avx512, and the matrix unit
#endif

// The level in use: the highest that the processor has, or lower where BIMOS_ISA or `use_level` says so.
const Level& level();

// Takes the level of this name; false where it is unknown or the processor does not have it.
bool use_level(const char* name);

}  // namespace bimos
