#include "matrices.h"

#include <algorithm>
#include <vector>

#include "tiles.h"

#ifdef BIMOS_X86
#include <immintrin.h>
#endif

namespace bimos::matrices {
namespace {

constexpr int64_t kPiece = 640;                     // inputs that share a step, at most: their strip of signs stays in the first cache
constexpr int64_t kDepth = 64;                      // inputs of a tile
constexpr int64_t kTileBytes = kTile * kDepth;
constexpr int64_t kStrip = 2 * amx::kWords;         // rows whose signs are made bytes at a time
constexpr int64_t kSecondCache = 1 << 20;           // bytes of it to fill
constexpr float kLargest = 32512, kLargestInt8 = 127;
constexpr float kFar = 8;  // times the root of the mean square: steps of the largest would be 7e-5 of the rest

// Inputs that share a step: a group, or as even a part of it as depths allow.
struct Pieces {
  int64_t in, group, parts, size;  // of a group: `parts` of `size`

  explicit Pieces(const Plane& plane) : in(plane.in), group(plane.grouped ? std::min(plane.block, plane.in) : plane.in) {
    parts = ceil_div(group, kPiece);
    size = ceil_div(ceil_div(group, parts), kDepth) * kDepth;
    parts = ceil_div(group, size);
  }

  int64_t count() const { return ceil_div(in, group) * parts; }
  int64_t group_of(int64_t piece) const { return piece / parts; }
  int64_t begin(int64_t piece) const { return std::min(in, piece / parts * group + piece % parts * size); }
  int64_t end(int64_t piece) const { return std::min({in, (piece / parts + 1) * group, piece / parts * group + (piece % parts + 1) * size}); }
  int64_t depths(int64_t piece) const { return ceil_div(end(piece) - begin(piece), kDepth); }
  int64_t most_depths() const { return size / kDepth; }
};

int64_t numbers_of(const Plane& plane) { return plane.int8 ? 1 : 3; }

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

#define BIMOS_MATRIX BIMOS_AVX512

BIMOS_MATRIX inline __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1U << n) - 1); }

BIMOS_MATRIX inline __m512 load_half(const uint16_t* from, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from)); }

constexpr int kSome = 4;  // tokens, and experts, that are taken together

template <int kTokens, int kExperts>
BIMOS_MATRIX void some_dots(const float* x, int64_t x_stride, const uint16_t* rows, int64_t n, float* logits, int64_t stride) {
  __m512 sums[kTokens][kExperts];
  for (int t = 0; t < kTokens; ++t)
    for (int e = 0; e < kExperts; ++e) sums[t][e] = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = lanes(n - j);
    __m512 row[kExperts];
    for (int e = 0; e < kExperts; ++e) row[e] = load_half(rows + e * n + j, mask);
    for (int t = 0; t < kTokens; ++t) {
      const __m512 value = _mm512_maskz_loadu_ps(mask, x + t * x_stride + j);
      for (int e = 0; e < kExperts; ++e) sums[t][e] = _mm512_fmadd_ps(value, row[e], sums[t][e]);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int e = 0; e < kExperts; ++e) logits[t * stride + e] = _mm512_reduce_add_ps(sums[t][e]);
}

template <int kExperts>
BIMOS_MATRIX void mix_of(const float* x, int64_t x_stride, const float* gates, int64_t tokens, const uint16_t* rows, int64_t experts, int64_t stride,
                         int64_t n, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = lanes(n - j);
    __m512 row[kExperts];
    for (int e = 0; e < kExperts; ++e) row[e] = load_half(rows + e * stride + j, mask);
    for (int64_t t = 0; t < tokens; ++t) {
      __m512 scale = _mm512_mul_ps(_mm512_set1_ps(gates[t * experts]), row[0]);
      for (int e = 1; e < kExperts; ++e) scale = _mm512_fmadd_ps(_mm512_set1_ps(gates[t * experts + e]), row[e], scale);
      for (int64_t e = kExperts; e < experts; ++e)  // more than there are registers for
        scale = _mm512_fmadd_ps(_mm512_set1_ps(gates[t * experts + e]), load_half(rows + e * stride + j, mask), scale);
      _mm512_mask_storeu_ps(out + t * out_stride + j, mask, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, x + t * x_stride + j)));
    }
  }
}

// The largest |x| and the sum of squares of `n` values; the first is NaN where any is not finite.
BIMOS_MATRIX void measure(const float* x, int64_t n, float& most, float& squares) {
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

// One token's row in the tiles of a piece: digits of x * factor, zeros behind its n inputs. `apart` bytes from digit to digit.
template <int kDigits>
BIMOS_MATRIX void digits(const float* x, int64_t n, float factor, uint8_t* row, int64_t apart) {
  const __m512 factors = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < ceil_div(n, kDepth) * kDepth; j += 16) {
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(factors, _mm512_maskz_loadu_ps(lanes(n - j), x + j)));
    uint8_t* to = row + j / kDepth * kTileBytes + j % kDepth;
    if constexpr (kDigits > 1) {
      const __m512i higher = _mm512_srai_epi32(code, 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (kDigits - 1) * apart), _mm512_cvtepi32_epi8(code));
      if constexpr (kDigits > 2) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + apart), _mm512_cvtepi32_epi8(higher));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_srai_epi32(code, 16)));
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(higher));
      }
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(code));
    }
  }
}

// Four inputs of a row by their nibble.
struct Bytes {
  alignas(64) uint8_t of_nibble[16][4];
};

constexpr Bytes kBytes = [] {
  Bytes bytes{};
  for (int nibble = 0; nibble < 16; ++nibble)
    for (int b = 0; b < 4; ++b) bytes.of_nibble[nibble][b] = (nibble >> b & 1) != 0 ? 1 : 0xff;
  return bytes;
}();

// 16 rows of a piece as right sides, tile after tile; `steps` of 32 inputs, 256 bytes apart (rows64).
BIMOS_MATRIX void expand(const uint8_t* data, int64_t steps, uint8_t* to) {
  const __m512i table = _mm512_load_si512(kBytes.of_nibble);
  for (int64_t step = 0; step < steps; ++step, data += 256, to += kTileBytes / 2) {
    const __m512i bits = _mm512_loadu_si512(data);  // an index is the lowest four bits of its lane
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      _mm512_store_si512(to + 64 * p, _mm512_permutexvar_epi32(_mm512_srli_epi32(bits, static_cast<unsigned>(8 * p)), table));
      _mm512_store_si512(to + 64 * (4 + p), _mm512_permutexvar_epi32(_mm512_srli_epi32(bits, static_cast<unsigned>(8 * p + 4)), table));
    }
  }
}

// sums [kTiles, 2, 16, 16] of digits of kTiles tiles of tokens with a strip.
template <int kTiles, bool kSigned>
BIMOS_INLINE void multiply(const uint8_t* left, int64_t to_next, const uint8_t* right, int64_t right_half, int64_t depths, int32_t* sums) {
  amx::zero<0>();
  amx::zero<1>();
  if constexpr (kTiles == 2) {
    amx::zero<2>();
    amx::zero<3>();
  }
  for (int64_t k = 0; k < depths; ++k, left += kTileBytes, right += kTileBytes) {
    amx::load<4>(left, kDepth);
    amx::load<6>(right, kDepth);
    amx::load<7>(right + right_half, kDepth);
    amx::add_bytes<0, 4, 6, kSigned>();
    amx::add_bytes<1, 4, 7, kSigned>();
    if constexpr (kTiles == 2) {
      amx::load<5>(left + to_next, kDepth);
      amx::add_bytes<2, 5, 6, kSigned>();
      amx::add_bytes<3, 5, 7, kSigned>();
    }
  }
  amx::store<0>(sums, 64);
  amx::store<1>(sums + 256, 64);
  if constexpr (kTiles == 2) {
    amx::store<2>(sums + 512, 64);
    amx::store<3>(sums + 768, 64);
  }
}

struct Sums {
  alignas(64) int32_t high[1024], low[1024], lowest[1024];
};

// Adds a piece's sums of a tile of tokens to y, or puts them there.
template <bool kInt8>
BIMOS_MATRIX void finish(const Sums& sums, int tile, bool is_fine, const float* steps, const __m512* scales, bool is_first, int64_t tokens, float* y,
                         int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    const __m512 step = _mm512_set1_ps(steps[t]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = (tile * 2 + half) * 256 + t * 16;
      __m512i whole = _mm512_load_si512(sums.high + at);
      if (!kInt8) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_load_si512(sums.low + at));
      __m512 value = _mm512_cvtepi32_ps(whole);
      if (is_fine) value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums.lowest + at)), _mm512_set1_ps(1.0F / 256), value);
      float* to = y + t * stride + 16 * half;
      const __m512 factor = _mm512_mul_ps(step, scales[half]);
      _mm512_storeu_ps(to, is_first ? _mm512_mul_ps(value, factor) : _mm512_fmadd_ps(value, factor, _mm512_loadu_ps(to)));
    }
  }
}

template <bool kInt8, int kTiles>
BIMOS_MATRIX void strip(const uint8_t* left, int64_t to_next, int64_t apart, const uint8_t* right, int64_t right_half, int64_t depths, bool is_fine, Sums& sums) {
  multiply<kTiles, true>(left, to_next, right, right_half, depths, sums.high);
  if (kInt8) return;
  multiply<kTiles, false>(left + apart, to_next, right, right_half, depths, sums.low);
  if (is_fine) multiply<kTiles, false>(left + 2 * apart, to_next, right, right_half, depths, sums.lowest);
}

template <bool kInt8>
BIMOS_MATRIX void product_of(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, float* y,
                             int64_t stride) {
  const Pieces pieces(plane);
  thread_local std::vector<uint8_t> kept;
  const int64_t right_half = pieces.most_depths() * kTileBytes;
  if (static_cast<int64_t>(kept.size()) < 2 * right_half + 64) kept.resize(static_cast<size_t>(2 * right_half + 64));
  uint8_t* right = kept.data() + (64 - reinterpret_cast<uintptr_t>(kept.data()) % 64) % 64;
  Sums sums;
  const auto bytes = static_cast<int64_t>(tile_bytes(plane)), floats = static_cast<int64_t>(tile_floats(plane));
  const int64_t row_tile = bimos::tile_bytes(Layout::rows64, plane), apart = pieces.most_depths() * kTileBytes;
  const int64_t group_bytes = ceil_div(std::min(plane.block, plane.in), 32) * 256 + (plane.grouped ? 128 : 0);
  const amx::Tiles all;
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    const int64_t begin = pieces.begin(piece), steps_of_signs = ceil_div(pieces.end(piece) - begin, 32), depths = pieces.depths(piece);
    if (depths <= 0) continue;
    const int64_t group = pieces.group_of(piece), in_group = plane.grouped ? begin - group * plane.block : begin;
    const int64_t offset = (plane.grouped ? group * group_bytes : 0) + in_group / 32 * 256;
    for (int64_t row = first * 64; row < last * 64; row += kStrip) {
      const uint8_t* tile = plane.data + row / 64 * row_tile;
      __m512 scales[2];
      for (int half = 0; half < 2; ++half) {
        const int64_t sixteen = row % 64 / 16 + half;
        expand(tile + offset + 64 * sixteen, steps_of_signs, right + half * right_half);
        // Where the last tile of depth has 32 inputs, digits behind them are zeros: signs may be anything.
        const uint8_t* behind = tile + (group + 1) * group_bytes - 128 + 32 * sixteen;
        if (plane.grouped && (group + 1) * plane.block > plane.in) behind = tile + row_tile - 128 + 32 * sixteen;
        scales[half] = plane.grouped ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(behind))) : _mm512_set1_ps(1.0F);
      }
      for (int64_t token = 0; token < tokens; token += 2 * kTile) {
        const int64_t at = token / kTile;
        const uint8_t* left = tiles + at * bytes + piece * apart * numbers_of(plane);
        const float* mine = steps + at * floats;
        const int64_t fine = pieces.count() * kTile + piece;
        const bool two = token + kTile < tokens;
        const bool is_fine = !kInt8 && (mine[fine] != 0 || (two && mine[floats + fine] != 0));
        if (two) {
          strip<kInt8, 2>(left, bytes, apart, right, right_half, depths, is_fine, sums);
        } else {
          strip<kInt8, 1>(left, bytes, apart, right, right_half, depths, is_fine, sums);
        }
        for (int half = 0; half < (two ? 2 : 1); ++half) {
          const int64_t here = token + half * kTile;
          finish<kInt8>(sums, half, !kInt8 && mine[half * floats + fine] != 0, mine + half * floats + piece * kTile, scales, piece == 0,
                        std::min(kTile, tokens - here), y + here * stride + row, stride);
        }
      }
    }
  }
}

}  // namespace

BIMOS_MATRIX void dots(const float* x, int64_t x_stride, int64_t tokens, const uint16_t* rows, int64_t experts, int64_t n, float* logits) {
  int64_t e = 0;
  for (; e + kSome <= experts; e += kSome) {
    int64_t t = 0;
    for (; t + kSome <= tokens; t += kSome) some_dots<kSome, kSome>(x + t * x_stride, x_stride, rows + e * n, n, logits + t * experts + e, experts);
    for (; t < tokens; ++t) some_dots<1, kSome>(x + t * x_stride, x_stride, rows + e * n, n, logits + t * experts + e, experts);
  }
  for (; e < experts; ++e)
    for (int64_t t = 0; t < tokens; ++t) some_dots<1, 1>(x + t * x_stride, x_stride, rows + e * n, n, logits + t * experts + e, experts);
}

BIMOS_MATRIX void mix(const float* x, int64_t x_stride, const float* gates, int64_t tokens, const uint16_t* rows, int64_t experts, int64_t stride,
                      int64_t n, float* out, int64_t out_stride) {
  const auto function = experts == 1 ? mix_of<1> : experts < 4 ? mix_of<2> : experts < 8 ? mix_of<4> : mix_of<8>;
  for (int64_t t = 0; t < tokens; t += kTile)  // whose lines the first cache holds
    function(x + t * x_stride, x_stride, gates + t * experts, std::min(kTile, tokens - t), rows, experts, stride, n, out + t * out_stride, out_stride);
}

BIMOS_MATRIX void prepare(const float* x, int64_t stride, int64_t count, const Plane& plane, uint8_t* tile, float* steps) {
  const Pieces pieces(plane);
  const int64_t apart = pieces.most_depths() * kTileBytes;
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
    for (int64_t t = 0; t < kTile; ++t) {
      uint8_t* row = tile + t * kDepth;
      steps[t] = t < count ? most[t] / top : 0.0F;
      const float factor = t < count && most[t] > 1e-30F ? top / most[t] : 0.0F;  // finite: below, all is next to nothing
      const int64_t there = factor == 0.0F ? 0 : n;
      const float* from = x + t * stride + begin;
      if (there == 0) {  // of no token, or of what is not finite: nothing of it may be read as a number
        for (int64_t j = 0; j < pieces.depths(piece) * numbers_of(plane); ++j)
          _mm512_storeu_si512(row + j / numbers_of(plane) * kTileBytes + j % numbers_of(plane) * apart, _mm512_setzero_si512());
      } else if (plane.int8) {
        digits<1>(from, n, factor, row, apart);
      } else if (fine[piece] != 0) {
        digits<3>(from, n, factor * 256, row, apart);
      } else {
        digits<2>(from, n, factor, row, apart);
      }
    }
  }
}

void product(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, float* y, int64_t stride) {
  (plane.int8 ? product_of<true> : product_of<false>)(plane, first, last, tiles, steps, tokens, y, stride);
}
#else
void dots(const float*, int64_t, int64_t, const uint16_t*, int64_t, int64_t, float*) {}
void mix(const float*, int64_t, const float*, int64_t, const uint16_t*, int64_t, int64_t, int64_t, float*, int64_t) {}
void prepare(const float*, int64_t, int64_t, const Plane&, uint8_t*, float*) {}
void product(const Plane&, int64_t, int64_t, const uint8_t*, const float*, int64_t, float*, int64_t) {}
#endif

}  // namespace bimos::matrices
