// Inputs of products by the matrix unit: whole numbers in tiles of 16 tokens.
#include "pieces.h"

namespace bimos::matrices {
namespace {

constexpr int64_t kSecondCache = 1 << 19;  // bytes of it to fill

}  // namespace

int64_t most_tokens(int64_t in) { return std::clamp<int64_t>(kSecondCache / (2 * in) / (2 * kTile), 1, 8) * 2 * kTile; }

size_t tile_bytes(const Plane& plane) {
  const Pieces pieces(plane);
  return static_cast<size_t>(pieces.count() * pieces.most_depths() * numbers_of(plane) * kTileBytes);
}

// The steps of 16 tokens a piece, then a word a piece: whether lowest digits count.
size_t tile_floats(const Plane& plane) { return static_cast<size_t>(Pieces(plane).count() * (kTile + 1)); }

#ifdef BIMOS_X86
namespace {

constexpr float kLargest = 32512, kLargestInt8 = 127;
constexpr float kFar = 8;  // times the root of the mean square: steps of the largest would be 7e-5 of the rest

// The largest |x| and the sum of squares of `n` values; the first is NaN where any is not finite.
BIMOS_AVX512 void measure(const float* x, int64_t n, float& most, float& squares) {
  __m512 largest = _mm512_setzero_ps(), strange = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(lanes(n - j), x + j);
    strange = _mm512_add_ps(strange, _mm512_sub_ps(value, value));
    sum = _mm512_fmadd_ps(value, value, sum);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(value));
  }
  most = _mm512_reduce_max_ps(largest) + _mm512_reduce_add_ps(strange);
  squares = _mm512_reduce_add_ps(sum);
}

// One token's row in the tiles of a piece: digits of x * factor, zeros behind its n inputs. Lower digits are `second` and `third` bytes on.
template <int kDigits>
BIMOS_AVX512 void digits(const float* x, int64_t n, float factor, uint8_t* row, [[maybe_unused]] int64_t second, [[maybe_unused]] int64_t third) {
  const __m512 factors = _mm512_set1_ps(factor);
  const __m512i half = _mm512_set1_epi32(128);  // a lower digit of 128 and more is one below zero, and one above it one more
  const auto put = [](uint8_t* to, __m512i code) BIMOS_AVX512 { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(code)); };
  for (int64_t j = 0; j < ceil_div(n, kDepth) * kDepth; j += 16) {
    __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(factors, _mm512_maskz_loadu_ps(lanes(n - j), x + j)));
    uint8_t* to = row + j / kDepth * kTileBytes + j % kDepth;
    if constexpr (kDigits > 2) {
      put(to + third, code);
      code = _mm512_srai_epi32(_mm512_add_epi32(code, half), 8);
    }
    if constexpr (kDigits > 1) {
      put(to + second, code);
      code = _mm512_srai_epi32(_mm512_add_epi32(code, half), 8);
    }
    put(to, code);
  }
}

}  // namespace

BIMOS_AVX512 void prepare(const float* x, int64_t stride, int64_t count, int64_t tokens, const Plane& plane, uint8_t* tile, float* steps) {
  const Pieces pieces(plane);
  const int64_t apart = pieces.most_depths() * kTileBytes;
  const bool both = is_paired(plane, tokens);
  const int64_t second = both ? tokens * kDepth : apart, third = both ? apart : 2 * apart;
  float* fine = steps + pieces.count() * kTile;
  for (int64_t piece = 0; piece < pieces.count(); ++piece, tile += apart * numbers_of(plane), steps += kTile) {
    const int64_t begin = pieces.begin(piece), n = pieces.end(piece) - begin;
    fine[piece] = 0;
    float most[kTile];
    for (int64_t t = 0; t < count; ++t) {
      float squares = 0;
      measure(x + t * stride + begin, n, most[t], squares);
      if (!plane.int8 && most[t] * most[t] * static_cast<float>(n) > kFar * kFar * squares) fine[piece] = 1;
    }
    const float top = plane.int8 ? kLargestInt8 : kLargest;
    for (int64_t t = 0; t < (both ? count : kTile); ++t) {
      uint8_t* row = tile + t * kDepth;
      steps[t] = t < count ? most[t] / top : 0.0F;
      const float factor = t < count && most[t] > 1e-30F ? top / most[t] : 0.0F;  // finite: below, all is next to nothing
      const int64_t there = factor == 0.0F ? 0 : n;
      const float* from = x + t * stride + begin;
      if (there == 0) {  // of no token, or of what is not finite: nothing of it may be read as a number
        for (int64_t depth = 0; depth < pieces.depths(piece); ++depth) {
          for (const int64_t digit : {int64_t{0}, second, third}) {
            if (digit == 0 || !plane.int8) _mm512_storeu_si512(row + digit + depth * kTileBytes, _mm512_setzero_si512());
          }
        }
      } else if (plane.int8) {
        digits<1>(from, n, factor, row, second, third);
      } else if (fine[piece] != 0) {
        digits<3>(from, n, factor * 256, row, second, third);
      } else {
        digits<2>(from, n, factor, row, second, third);
      }
    }
  }
}

#else
void prepare(const float*, int64_t, int64_t, int64_t, const Plane&, uint8_t*, float*) {}
#endif

}  // namespace bimos::matrices
