// A packed linear on plain pointers: gates, scales, product and bias of every token (the equation is in kernels/reference.py).
#pragma once

#include "level.h"

namespace bimos {

// Runs `task(index, context)` for every index below `tasks`, at most `size` at a time; returns when all are done.
struct Pool {
  int64_t size;
  void (*run)(int64_t tasks, void (*task)(int64_t index, void* context), void* context);
};

struct Linear {
  int64_t in, out, planes, experts;
  int64_t block;             // inputs of a group, or kBlock
  bool grouped;
  bool int8;                 // sums of four inputs in 8 bits
  const uint8_t* tiles;      // [planes, tile_count, tile_bytes]
  const uint16_t* scale_in;  // float16 [planes, experts, in] or null
  const uint16_t* scale_out; // float16 [planes, experts, out] or null
  const uint16_t* router;    // float16 [experts, in] or null
  const void* bias;          // [out] or null
  Dtype bias_dtype;
  const float* offset;       // of groups, [groups, out] or null: each times the sum of its group's inputs is added
};

// Inputs up to which a row of float32 must hold zeros.
inline int64_t padded_inputs(int64_t in) { return (in + 31) / 32 * 32; }

// How many of `tokens` to give `rows_of_linear`.
int64_t tokens_at_a_time(const Level& level, const Linear& linear, int64_t tokens);

// Rows of tiles [first, last) of y, for `count` tokens, as many as `tokens_at_a_time` says or kTokens; float32, `x_stride` and `y_stride` values from token to token.
// x holds zeros up to padded_inputs(in). Runs in the caller's thread.
void rows_of_linear(const Level& level, const Linear& linear, const float* x, int64_t x_stride, int64_t count, int64_t first, int64_t last,
                    float* y, int64_t y_stride);

// y [tokens, out] of x [tokens, in], both contiguous and of `dtype`. The tiles are in the layout of `level`.
void apply(const Level& level, const Linear& linear, const void* x, Dtype dtype, int64_t tokens, void* y, const Pool& pool);

// y [tokens, out] = scale * (weight @ x) + bias; weight int8 [out, in], scale float32 [out], bias float32 [out] or null.
void apply_int8(const Level& level, const int8_t* weight, const float* scale, const float* bias, int64_t in, int64_t out, const void* x,
                Dtype dtype, int64_t tokens, void* y, const Pool& pool);

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace bimos
