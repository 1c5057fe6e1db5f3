// Products with rows of integers, as embeddings and heads have: 8 or 4 bits wide, once for every kind of processor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bimos {

constexpr int64_t kAhead = 8192;  // bytes by which reading a row's matrix is announced: memory answers late

struct Rows {
  // A token's values in the form in which `int8` multiplies them, in `int8_bytes(n)` bytes, a multiple of 64; 64-byte aligned.
  size_t (*int8_bytes)(int64_t n);
  void (*int8_prepare)(const float* x, int64_t n, uint8_t* prepared);

  // y[t][r] = sum_j w[r, j] x[t][j]; int8 rows of n. t < tokens <= kTokens.
  void (*int8)(const int8_t* weight, int64_t rows, int64_t n, const uint8_t* const* prepared, int tokens, float* const* y);

  // The same for rows of 4 bits in tiles (int4.h), `prepared` by `int4_prepare`.
  void (*int4)(const uint8_t* tiles, int64_t rows, int64_t n, const uint8_t* const* prepared, int tokens, float* const* y);
};

const Rows& scalar_rows();
#ifdef BIMOS_X86
const Rows& avx2_rows();
const Rows& avx512_rows();
#endif

}  // namespace bimos
