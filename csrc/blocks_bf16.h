// Products of blocks of bfloat16 that sum in float32: of pairs (vdpbf16ps), or by the matrix unit.
//
// A word is two values side by side along the depth of a product. Rows of words go in from the left; from the right a matrix whose row p
// holds, for each column, values 2p and 2p+1 of the depth.
#pragma once

#include <cstring>

#include "amx.h"
#include "flash.h"
#include "vectors.h"

#ifdef BIMOS_X86
#include <immintrin.h>

#define BIMOS_TARGET __attribute__((target("avx512bf16," BIMOS_AVX512_HAS)))
#define BIMOS_BF16 BIMOS_TARGET BIMOS_INLINE

namespace bimos::flash {

constexpr int64_t kPairs = kBlock / 2;
constexpr int64_t kRows = 4, kVectors = 4;  // of a tile of sums

// c [kRows, 16 kCount] = (kAdd ? c : 0) + a b over `depth` words, rows of `a_stride`, `b_stride` and `c_stride`.
template <int kCount, bool kAdd>
BIMOS_BF16 void strip(int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c, int64_t c_stride) {
  __m512 sums[kRows][kCount];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kCount; ++v) sums[i][v] = kAdd ? _mm512_loadu_ps(c + i * c_stride + v * kWidth) : _mm512_setzero_ps();
  for (int64_t p = 0; p < depth; ++p) {
    __m512bh columns[kCount];
    for (int v = 0; v < kCount; ++v) columns[v] = std::bit_cast<__m512bh>(_mm512_loadu_si512(b + p * b_stride + v * kWidth));
    for (int i = 0; i < kRows; ++i) {
      const auto word = std::bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[i * a_stride + p])));
      for (int v = 0; v < kCount; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], word, columns[v]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kCount; ++v) _mm512_storeu_ps(c + i * c_stride + v * kWidth, sums[i][v]);
}

// c [32, 32] = (kAdd ? c : 0) + a b over `depth` words, a multiple of 16, by the matrix unit.
template <bool kAdd>
BIMOS_BF16 void square(int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c, int64_t c_stride) {
  float *upper = c, *lower = c + amx::kRows * c_stride;
  if (kAdd) {
    amx::load<0>(upper, c_stride * 4);
    amx::load<1>(upper + amx::kWords, c_stride * 4);
    amx::load<2>(lower, c_stride * 4);
    amx::load<3>(lower + amx::kWords, c_stride * 4);
  } else {
    amx::zero<0>();
    amx::zero<1>();
    amx::zero<2>();
    amx::zero<3>();
  }
  for (int64_t p = 0; p < depth; p += amx::kWords, a += amx::kWords, b += amx::kWords * b_stride) {
    amx::load<4>(a, a_stride * 4);
    amx::load<6>(b, b_stride * 4);
    amx::load<7>(b + amx::kWords, b_stride * 4);
    amx::load<5>(a + amx::kRows * a_stride, a_stride * 4);
    amx::add_bfloat16<0, 4, 6>();
    amx::add_bfloat16<1, 4, 7>();
    amx::add_bfloat16<2, 5, 6>();
    amx::add_bfloat16<3, 5, 7>();
  }
  amx::store<0>(upper, c_stride * 4);
  amx::store<1>(upper + amx::kWords, c_stride * 4);
  amx::store<2>(lower, c_stride * 4);
  amx::store<3>(lower + amx::kWords, c_stride * 4);
}

// c [rows, columns] = (kAdd ? c : 0) + a b; both are multiples of 32. `depth(i)` words are seen by rows [i, i + 32).
template <bool kMatrix, bool kAdd, typename Depth>
BIMOS_BF16 void multiply(int64_t rows, int64_t columns, Depth depth, const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, float* c,
                         int64_t c_stride) {
  if constexpr (kMatrix) {
    for (int64_t j = 0; j < columns; j += 32)
      for (int64_t i = 0; i < rows; i += 32) square<kAdd>(depth(i), a + i * a_stride, a_stride, b + j, b_stride, c + i * c_stride + j, c_stride);
  } else {
    int64_t j = 0;
    for (; j + kVectors * kWidth <= columns; j += kVectors * kWidth)
      for (int64_t i = 0; i < rows; i += kRows)
        strip<kVectors, kAdd>(depth(i), a + i * a_stride, a_stride, b + j, b_stride, c + i * c_stride + j, c_stride);
    for (; j < columns; j += kWidth)
      for (int64_t i = 0; i < rows; i += kRows) strip<1, kAdd>(depth(i), a + i * a_stride, a_stride, b + j, b_stride, c + i * c_stride + j, c_stride);
  }
}

// Rows of a block with depth along them, [kBlock, width / 2] words, as the right side of a product: [width / 2, kBlock].
inline void turn(const uint32_t* rows, int64_t width, uint32_t* to) {
  const int64_t words = width / 2;
  for (int64_t p = 0; p < words; ++p)
    for (int64_t i = 0; i < kBlock; ++i) to[p * kBlock + i] = rows[i * words + p];
}

// Rows of a block with depth across them, as the right side: [kBlock / 2, width].
BIMOS_BF16 void pair_up(const uint32_t* words, int64_t width, uint32_t* to) {
  const auto* rows = reinterpret_cast<const uint16_t*>(words);
  for (int64_t p = 0; p < kPairs; ++p, rows += 2 * width, to += width) {
    for (int64_t j = 0; j < width; j += kWidth) {
      Halves even, odd;
      std::memcpy(&even, rows + j, sizeof even);
      std::memcpy(&odd, rows + width + j, sizeof odd);
      const Words both = __builtin_convertvector(even, Words) | __builtin_convertvector(odd, Words) << 16;
      std::memcpy(to + j, &both, sizeof both);
    }
  }
}

BIMOS_BF16 __m512bh halves(Floats low, Floats high) { return _mm512_cvtne2ps_pbh(std::bit_cast<__m512>(high), std::bit_cast<__m512>(low)); }

}  // namespace bimos::flash
#endif
