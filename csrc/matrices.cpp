#include "matrices.h"

#include <algorithm>

#include "pieces.h"
#include "room.h"

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

// sums [2, 16, 16] of a digit of a tile of tokens with a strip; with two tiles, those of what lies `to_next` bytes on, too: the next tile's
// digit, or this one's next digit. Four sums at a time keep the unit busy.
template <int kTiles, bool kSigned, bool kNextSigned = kSigned>
BIMOS_INLINE void multiply(const uint8_t* left, int64_t to_next, const uint8_t* right, int64_t right_half, int64_t depths, int32_t* sums,
                           [[maybe_unused]] int32_t* next) {
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
      amx::add_bytes<2, 5, 6, kNextSigned>();
      amx::add_bytes<3, 5, 7, kNextSigned>();
    }
  }
  amx::store<0>(sums, 64);
  amx::store<1>(sums + 256, 64);
  if constexpr (kTiles == 2) {
    amx::store<2>(next, 64);
    amx::store<3>(next + 256, 64);
  }
}

struct Sums {
  alignas(64) int32_t high[1024], low[1024], lowest[1024];
};

// What is made of a strip's sums: rows of 32 values, `stride` from token to token; null for none.
struct Rows {
  float* values;
  int64_t stride;

  float* at(int64_t token) const { return values == nullptr ? nullptr : values + token * stride; }
};

// to = before + a piece's sums of a tile of `tokens`.
template <bool kInt8>
BIMOS_AVX512 void add(const Sums& sums, int tile, bool is_fine, const float* steps, const __m512* scales, int64_t tokens, Rows before, Rows to) {
  for (int64_t t = 0; t < tokens; ++t) {
    const __m512 step = _mm512_set1_ps(steps[t]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = (tile * 2 + half) * 256 + t * 16;
      __m512i whole = _mm512_load_si512(sums.high + at);
      if (!kInt8) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_load_si512(sums.low + at));
      __m512 value = _mm512_cvtepi32_ps(whole);
      if (is_fine) value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums.lowest + at)), _mm512_set1_ps(1.0F / 256), value);
      const __m512 factor = _mm512_mul_ps(step, scales[half]);
      const __m512 so_far = before.values == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(before.at(t) + 16 * half);
      _mm512_storeu_ps(to.at(t) + 16 * half, _mm512_fmadd_ps(value, factor, so_far));
    }
  }
}

// Rows of a strip by their scales, mixed by each token's gates.
BIMOS_AVX512 void scale(const Mixed& mixed, int64_t row, int64_t token, int64_t tokens, Rows y) {
  __m512 rows[kMostMixed][2];
  for (int64_t e = 0; e < mixed.experts; ++e) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + 16 * half, count = std::clamp<int64_t>(mixed.out - at, 0, 16);
      const auto mask = static_cast<__mmask16>((1U << count) - 1);
      rows[e][half] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, mixed.scales + e * mixed.out + at));
    }
  }
  for (int64_t t = token; t < token + tokens; ++t) {
    const float* gate = mixed.gates + t * mixed.experts;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 factor = _mm512_mul_ps(_mm512_set1_ps(gate[0]), rows[0][half]);
      for (int64_t e = 1; e < mixed.experts; ++e) factor = _mm512_fmadd_ps(_mm512_set1_ps(gate[e]), rows[e][half], factor);
      float* to = y.at(t) + 16 * half;
      _mm512_storeu_ps(to, _mm512_mul_ps(factor, _mm512_loadu_ps(to)));
    }
  }
}

template <bool kInt8, int kTiles>
BIMOS_AVX512 void strip(const uint8_t* left, int64_t to_next, int64_t apart, const uint8_t* right, int64_t right_half, int64_t depths, bool is_fine, Sums& sums) {
  if constexpr (!kInt8 && kTiles == 1) {
    multiply<2, true, false>(left, apart, right, right_half, depths, sums.high, sums.low);  // both digits
  } else {
    multiply<kTiles, true>(left, to_next, right, right_half, depths, sums.high, sums.high + 512);
    if (kInt8) return;
    multiply<kTiles, false>(left + apart, to_next, right, right_half, depths, sums.low, sums.low + 512);
  }
  if (is_fine) multiply<kTiles, false>(left + 2 * apart, to_next, right, right_half, depths, sums.lowest, sums.lowest + 512);
}

// A strip's signs of a piece, and the scales of its rows in that piece's group.
struct Signs {
  uint8_t* bytes;
  int64_t half;  // bytes of 16 rows
  __m512 scales[2];

  BIMOS_AVX512 void make(const Plane& plane, const Pieces& pieces, int64_t piece, int64_t row) {
    const int64_t row_tile = bimos::tile_bytes(Layout::rows64, plane), group = plane.grouped ? pieces.group_of(piece) : 0, begin = pieces.begin(piece);
    const int64_t group_bytes = ceil_div(std::min(plane.block, plane.in), 32) * 256 + (plane.grouped ? 128 : 0);
    const uint8_t* tile = plane.data + row / 64 * row_tile;
    const uint8_t* from = tile + group * group_bytes + (begin - (plane.grouped ? group * plane.block : 0)) / 32 * 256;
    const bool is_last = (group + 1) * plane.block >= plane.in;
    const uint8_t* behind = is_last ? tile + row_tile - 128 : tile + (group + 1) * group_bytes - 128;
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t sixteen = row % 64 / 16 + i;
      // Where the last tile of depth has 32 inputs, digits behind them are zeros: signs may be anything.
      expand(from + 64 * sixteen, ceil_div(pieces.end(piece) - begin, 32), bytes + i * half);
      scales[i] = plane.grouped ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(behind + 32 * sixteen))) : _mm512_set1_ps(1.0F);
    }
  }
};

template <bool kInt8>
BIMOS_AVX512 void product_of(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, const Mixed* mixed,
                             float* y, int64_t stride) {
  const Pieces pieces(plane);
  const int64_t apart = pieces.most_depths() * kTileBytes, count = pieces.count();
  const auto bytes = static_cast<int64_t>(tile_bytes(plane)), floats = static_cast<int64_t>(tile_floats(plane));
  Room room((2 * apart + tokens * kStrip * 4) / 4 + 2 * Room::kLine);
  Signs signs{reinterpret_cast<uint8_t*>(room.words(2 * apart / 4)), apart, {}};
  const Rows between{room.floats(tokens * kStrip), kStrip};  // rows of y may lie where the first cache has room for few of them
  Sums sums;
  const amx::Tiles all(std::min(kTile, tokens));
  for (int64_t row = first * 64; row < last * 64; row += kStrip) {
    for (int64_t piece = 0; piece < count; ++piece) {
      const int64_t depths = pieces.depths(piece);
      if (depths <= 0) continue;  // the last group has fewer inputs than others
      signs.make(plane, pieces, piece, row);
      const bool is_last = pieces.end(piece) == plane.in;
      for (int64_t token = 0; token < tokens; token += 2 * kTile) {
        const uint8_t* left = tiles + token / kTile * bytes + piece * apart * numbers_of(plane);
        const float *mine = steps + token / kTile * floats, *fine = mine + count * kTile + piece;
        const bool two = token + kTile < tokens, is_fine = !kInt8 && (fine[0] != 0 || (two && fine[floats] != 0));
        if (two) {
          strip<kInt8, 2>(left, bytes, apart, signs.bytes, apart, depths, is_fine, sums);
        } else {
          strip<kInt8, 1>(left, bytes, apart, signs.bytes, apart, depths, is_fine, sums);
        }
        for (int tile = 0; tile < (two ? 2 : 1); ++tile) {
          const int64_t here = token + tile * kTile, some = std::min(kTile, tokens - here);
          const Rows before{piece == 0 ? nullptr : between.at(here), kStrip};
          const Rows to = is_last ? Rows{y + here * stride + row, stride} : Rows{between.at(here), kStrip};
          add<kInt8>(sums, tile, !kInt8 && fine[tile * floats] != 0, mine + tile * floats + piece * kTile, signs.scales, some, before, to);
        }
      }
    }
    if (mixed != nullptr) scale(*mixed, row, 0, tokens, {y + row, stride});
  }
}

}  // namespace

void product(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, const Mixed* mixed, float* y,
             int64_t stride) {
  (plane.int8 ? product_of<true> : product_of<false>)(plane, first, last, tiles, steps, tokens, mixed, y, stride);
}
#else
void product(const Plane&, int64_t, int64_t, const uint8_t*, const float*, int64_t, const Mixed*, float*, int64_t) {}
#endif

}  // namespace bimos::matrices
