#include "bytes.h"

#include <algorithm>
#include <cstring>

#include "matrices_multiply.h"
#include "room.h"

namespace bimos::bytes {
namespace {

constexpr int64_t kSide = 1024;  // bytes of a right side: 16 words of 16 rows
constexpr int64_t kColumns = 4, kRows = kStrip / kColumns, kInputs = 64;

int64_t depths_of(int64_t n) { return ceil_div(n, kInputs); }
int64_t strip_bytes(int64_t n) { return depths_of(n) * kColumns * kSide; }

}  // namespace

size_t tile_bytes(int64_t rows, int64_t n) { return static_cast<size_t>(ceil_div(rows, kStrip) * strip_bytes(n)); }

void make_tiles(const int8_t* from, int64_t rows, int64_t n, int64_t first, int64_t last, uint8_t* to) {
  to += first * strip_bytes(n);
  for (int64_t side = first * kColumns * depths_of(n); side < last * kColumns * depths_of(n); ++side, to += kSide) {
    const int64_t strip = side / (kColumns * depths_of(n)), depth = side / kColumns % depths_of(n);
    const int64_t row = strip * kStrip + side % kColumns * kRows, input = depth * kInputs, there = std::min(kInputs, n - input);
    if (there < kInputs || row + kRows > rows) std::memset(to, 0, kSide);
    for (int64_t r = 0; r < std::min(kRows, rows - row); ++r) {
      const int8_t* words = from + (row + r) * n + input;
      for (int64_t j = 0; j < there; j += 4) std::memcpy(to + j * kRows + 4 * r, words + j, static_cast<size_t>(std::min<int64_t>(4, there - j)));
    }
  }
}

#ifdef BIMOS_X86
namespace {

using namespace matrices;

// The right sides of a piece's depths, of some of a strip's columns.
struct Stored {
  const uint8_t* sides;

  const uint8_t* at(int64_t depth) const { return sides + depth * bytes::kColumns * kSide; }

  template <int kQuarter>
  BIMOS_AVX512 BIMOS_INLINE void make(int64_t depth) const {
    const uint8_t* ahead = at(depth) + kAhead + kQuarter * kSide;
#pragma GCC unroll 16
    for (int line = 0; line < 16; ++line) _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * line), _MM_HINT_T0);
  }
};

// Up to kMost tokens; left sides as in matrices.cpp.
template <bool kPaired, int kLeft>
BIMOS_AVX512 void product_of(const uint8_t* tiles, const float* scale, const Plane& plane, int64_t first, int64_t last, const uint8_t* left, const float* steps,
                             int64_t tokens, float* const* y) {
  constexpr int kSides = kLeft == 1 ? 4 : 2, kParts = bytes::kColumns / kSides;
  constexpr int64_t kPart = kSides * kSixteen;
  constexpr bool kMayBeFine = kLeft == (kPaired ? 2 : 3);
  constexpr int kFewer = kMayBeFine ? kLeft - 1 : kLeft;
  const Pieces pieces(plane);
  const int64_t apart = pieces.most_depths() * kTileBytes, count = pieces.count(), units = ceil_div(tokens, kTile);
  const auto size = static_cast<int64_t>(matrices::tile_bytes(plane)), floats = static_cast<int64_t>(tile_floats(plane));
  alignas(64) float sums_so_far[kTile * kPart], row_scales[kPart]{};
  Sums sums;
  Owed<false, kSides> owed{};
  owed.sums = sums.values;
  owed.low = sums.values + (kPaired ? tokens * kSixteen : kSides * kSum);
  owed.to_steps = floats;
  owed.stride_before = owed.stride = kPart;
  owed.to = sums_so_far;
  const amx::Tiles all(kPaired ? 2 * tokens : kTile, kRights<kLeft>);
  for (int64_t strip = first / kStrip; strip * kStrip < last; ++strip) {
    for (int64_t unit = 0; unit < units; ++unit) {
      for (int64_t part = 0; part < kParts; ++part) {
        const int64_t row = strip * kStrip + part * kPart, there = std::min(kPart, last - row);
        if (there <= 0) continue;
        for (int64_t piece = 0; piece < count; ++piece) {
          Stored stored{tiles + strip * strip_bytes(plane.in) + part * kSides * kSide};
          const uint8_t* piece_left = left + unit * size + piece * apart * numbers_of(plane);
          const float* unit_steps = steps + unit * floats;
          const bool is_fine = kMayBeFine && unit_steps[count * kTile + piece] != 0;
          const int64_t depth = piece * pieces.most_depths(), depths = pieces.depths(piece);
          if (is_fine) {
            multiply<kLeft, kSides>(piece_left, apart, stored, depth, depths, sums.values, owed);
          } else {
            multiply<kFewer, kSides>(piece_left, apart, stored, depth, depths, sums.values, owed);
          }
          owed.next = 0;
          owed.tokens = std::min(kTile, tokens - unit * kTile);
          owed.lowest = is_fine ? sums.values + (kLeft - 1) * kSides * kSum : nullptr;
          owed.steps = unit_steps + piece * kTile;
          owed.before = piece == 0 ? nullptr : sums_so_far;
        }
        owed.pay(owed.tokens);
        std::memcpy(row_scales, scale + row, static_cast<size_t>(there) * 4);
        for (int64_t t = 0; t < owed.tokens; ++t) {
          float* to = y[unit * kTile + t] + (row - first);
          for (int64_t r = 0; r < there; r += 16) {
            const __m512 value = _mm512_mul_ps(_mm512_load_ps(sums_so_far + t * kPart + r), _mm512_load_ps(row_scales + r));
            _mm512_mask_storeu_ps(to + r, lanes(there - r), value);
          }
        }
        owed.tokens = 0;
      }
    }
  }
}

constexpr int64_t kFew = 4;  // tokens, by vectors

// What kDigits digits of kCount tokens add to the sums of 64 rows over a piece. `digits` are the bytes of the first one of the first token; those of the next
// token follow 64 bytes on, the second digits behind all tokens' first; the third ones are `apart` bytes behind the first. A row is multiplied by all at
// once where registers suffice: while it is read again, memory is idle.
template <int kCount, int kDigits>
BIMOS_AVX512 BIMOS_INLINE void add_digits(const uint8_t* sides, const uint8_t* digits, int64_t apart, int64_t depths, float factor, const float* steps,
                                          __m512 (*sums)[bytes::kColumns]) {
  const __m512i flip = _mm512_set1_epi8(-128);  // to bytes + 128, unsigned
  constexpr int kLines = kCount * kDigits, kTogether = kLines > 4 ? 2 : 4;  // columns, whose sums are in registers
  const auto line_at = [apart](int l) BIMOS_ALWAYS { return l < 2 * kCount ? l * kDepth : apart + (l - 2 * kCount) * kDepth; };
  for (int first = 0; first < bytes::kColumns; first += kTogether) {
    __m512i whole[kLines][kTogether], all[kLines];
    for (int l = 0; l < kLines; ++l) {
      all[l] = _mm512_setzero_si512();
      for (int c = 0; c < kTogether; ++c) whole[l][c] = _mm512_setzero_si512();
    }
    for (int64_t depth = 0; depth < depths; ++depth) {
      const uint8_t* side = sides + depth * bytes::kColumns * kSide + first * kSide;
      const uint8_t* line = digits + depth * kTileBytes;
      for (int64_t word = 0; word < kSixteen; ++word) {
        __m512i positive[kTogether];
        for (int c = 0; c < kTogether; ++c) {
          _mm_prefetch(reinterpret_cast<const char*>(side + kAhead + c * kSide + 64 * word), _MM_HINT_T0);
          positive[c] = _mm512_xor_si512(_mm512_load_si512(side + c * kSide + 64 * word), flip);
        }
        for (int l = 0; l < kLines; ++l) {
          int32_t four = 0;
          std::memcpy(&four, line + line_at(l) + 4 * word, 4);
          const __m512i inputs = _mm512_set1_epi32(four);
          for (int c = 0; c < kTogether; ++c) whole[l][c] = _mm512_dpbusd_epi32(whole[l][c], positive[c], inputs);
        }
      }
      for (int l = 0; l < kLines; ++l) all[l] = _mm512_dpbusd_epi32(all[l], flip, _mm512_load_si512(line + line_at(l)));
    }
    for (int t = 0; t < kCount; ++t) {
      for (int c = 0; c < kTogether; ++c) {
        __m512 value = _mm512_setzero_ps();
        for (int d = 0; d < kDigits; ++d) {
          const int l = d * kCount + t;
          const __m512i sum = _mm512_sub_epi32(whole[l][c], _mm512_set1_epi32(_mm512_reduce_add_epi32(all[l])));
          value = _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum));
        }
        sums[t][first + c] = _mm512_fmadd_ps(value, _mm512_set1_ps(factor * steps[t]), sums[t][first + c]);
      }
    }
  }
}

template <int kCount>
BIMOS_AVX512 void product_of_few(const uint8_t* tiles, const float* scale, const Plane& plane, int64_t first, int64_t last, const uint8_t* left, const float* steps,
                                 float* const* y) {
  const Pieces pieces(plane);
  const int64_t apart = pieces.most_depths() * kTileBytes, count = pieces.count();
  for (int64_t row = first; row < last; row += kStrip) {
    __m512 sums[kCount][bytes::kColumns];
    for (auto& token : sums)
      for (auto& sum : token) sum = _mm512_setzero_ps();
    for (int64_t piece = 0; piece < count; ++piece) {
      const uint8_t* sides = tiles + row / kStrip * strip_bytes(plane.in) + piece * pieces.most_depths() * bytes::kColumns * kSide;
      const uint8_t* high = left + piece * apart * numbers_of(plane);
      const int64_t depths = pieces.depths(piece);
      const bool is_fine = steps[count * kTile + piece] != 0;
      if (kCount <= 2 && is_fine) {
        add_digits<kCount, 3>(sides, high, apart, depths, 1.0F / 256, steps + piece * kTile, sums);
      } else {
        add_digits<kCount, 2>(sides, high, apart, depths, 1, steps + piece * kTile, sums);
        if (is_fine) add_digits<kCount, 1>(sides, high + apart, apart, depths, 1.0F / 256, steps + piece * kTile, sums);
      }
    }
    for (int64_t c = 0; c < bytes::kColumns && row + c * kSixteen < last; ++c) {
      const __mmask16 mask = lanes(last - row - c * kSixteen);
      const __m512 scales = _mm512_maskz_loadu_ps(mask, scale + row + c * kSixteen);
      for (int t = 0; t < kCount; ++t) _mm512_mask_storeu_ps(y[t] + (row - first) + c * kSixteen, mask, _mm512_mul_ps(sums[t][c], scales));
    }
  }
}

}  // namespace

void product(const uint8_t* tiles, const float* scale, int64_t n, int64_t first, int64_t last, const float* x, int64_t stride, int64_t tokens,
             float* const* y) {
  const Plane plane{nullptr, n, kBlock, false, false};
  const auto size = static_cast<int64_t>(matrices::tile_bytes(plane)), floats = static_cast<int64_t>(tile_floats(plane)), count = ceil_div(tokens, kTile);
  Room room(count * (size / 4 + up(floats, Room::kLine)) + Room::kLine);
  auto* left = reinterpret_cast<uint8_t*>(room.words(count * size / 4));
  float* steps = room.floats(count * floats);
  for (int64_t t = 0; t < tokens; t += kTile)
    prepare(x + t * stride, stride, std::min(kTile, tokens - t), tokens, plane, left + t / kTile * size, steps + t / kTile * floats);
  if (tokens <= kFew) {
    const auto function = tokens == 1 ? product_of_few<1> : tokens == 2 ? product_of_few<2> : tokens == 3 ? product_of_few<3> : product_of_few<4>;
    return function(tiles, scale, plane, first, last, left, steps, y);
  }
  const bool fine = any_is_fine(steps, floats, count, Pieces(plane).count());
  const auto function = is_paired(plane, tokens) ? (fine ? product_of<true, 2> : product_of<true, 1>) : fine ? product_of<false, 3> : product_of<false, 2>;
  function(tiles, scale, plane, first, last, left, steps, tokens, y);
}
#else
void product(const uint8_t*, const float*, int64_t, int64_t, int64_t, const float*, int64_t, int64_t, float* const*) {}
#endif

}  // namespace bimos::bytes
