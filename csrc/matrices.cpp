#include "matrices.h"

#include <algorithm>
#include <vector>

#include "pieces.h"

#ifdef BIMOS_X86
#include <immintrin.h>
#endif

namespace bimos::matrices {

#ifdef BIMOS_X86
namespace {

constexpr int64_t kStrip = 2 * amx::kWords;  // rows whose signs are made bytes at a time

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
BIMOS_AVX512 void expand(const uint8_t* data, int64_t steps, uint8_t* to) {
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
BIMOS_AVX512 void finish(const Sums& sums, int tile, bool is_fine, const float* steps, const __m512* scales, bool is_first, int64_t tokens, float* y,
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
BIMOS_AVX512 void strip(const uint8_t* left, int64_t to_next, int64_t apart, const uint8_t* right, int64_t right_half, int64_t depths, bool is_fine, Sums& sums) {
  multiply<kTiles, true>(left, to_next, right, right_half, depths, sums.high);
  if (kInt8) return;
  multiply<kTiles, false>(left + apart, to_next, right, right_half, depths, sums.low);
  if (is_fine) multiply<kTiles, false>(left + 2 * apart, to_next, right, right_half, depths, sums.lowest);
}

template <bool kInt8>
BIMOS_AVX512 void product_of(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, float* y,
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

void product(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, float* y, int64_t stride) {
  (plane.int8 ? product_of<true> : product_of<false>)(plane, first, last, tiles, steps, tokens, y, stride);
}
#else
void product(const Plane&, int64_t, int64_t, const uint8_t*, const float*, int64_t, float*, int64_t) {}
#endif

}  // namespace bimos::matrices
