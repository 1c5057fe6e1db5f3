// A plane's signs as right sides of the matrix unit: bytes of +1 and -1. For matrices.cpp alone.
#pragma once

#include "matrices_owed.h"

#ifdef BIMOS_X86
namespace bimos::matrices {
namespace {

// Four inputs of a row by their nibble.
struct Nibbles {
  alignas(64) uint8_t of_nibble[16][4];
};

constexpr Nibbles kNibbles = [] {
  Nibbles nibbles{};
  for (int nibble = 0; nibble < 16; ++nibble)
    for (int b = 0; b < 4; ++b) nibbles.of_nibble[nibble][b] = (nibble >> b & 1) != 0 ? 1 : 0xff;
  return nibbles;
}();

// 16 rows of 32 inputs as half of a right side.
BIMOS_AVX512 inline void expand(const uint8_t* data, uint8_t* to) {
  _mm_prefetch(reinterpret_cast<const char*>(data + kAhead), _MM_HINT_T0);
  const __m512i table = _mm512_load_si512(kNibbles.of_nibble), bits = _mm512_loadu_si512(data);  // an index is the lowest four bits of its lane
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    _mm512_store_si512(to + 64 * p, _mm512_permutexvar_epi32(_mm512_srli_epi32(bits, static_cast<unsigned>(8 * p)), table));
    _mm512_store_si512(to + 64 * (4 + p), _mm512_permutexvar_epi32(_mm512_srli_epi32(bits, static_cast<unsigned>(8 * p + 4)), table));
  }
}

// Where a piece's signs lie in every row tile; found once for all of them.
struct Place {
  int64_t piece, depths, signs, scales;
  int64_t steps;  // of 32 inputs, 256 bytes apart (rows64)
};

// The pieces that are not empty: the last group may have fewer inputs than others.
inline int64_t find_places(const Plane& plane, const Pieces& pieces, Place* places) {
  const int64_t row_tile = bimos::tile_bytes(Layout::rows64, plane);
  const int64_t group_bytes = ceil_div(std::min(plane.block, plane.in), 32) * 256 + (plane.grouped ? 128 : 0);
  int64_t count = 0;
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    const int64_t group = plane.grouped ? pieces.group_of(piece) : 0, begin = pieces.begin(piece), depths = pieces.depths(piece);
    const bool is_last = (group + 1) * plane.block >= plane.in;
    if (depths <= 0) continue;
    places[count++] = {piece, depths, group * group_bytes + (begin - (plane.grouped ? group * plane.block : 0)) / 32 * 256,
                       (is_last ? row_tile : (group + 1) * group_bytes) - 128, ceil_div(pieces.end(piece) - begin, 32)};
  }
  return count;
}

// The rows of a strip, in their row tile.
struct Strip {
  const uint8_t* tile;
  int64_t row;  // rows of it that come before

  Strip(const Plane& plane, int64_t row_tile, int64_t row) : tile(plane.data + (row >> 6) * row_tile), row(row & 63) {}

  const uint8_t* signs(const Place& place) const { return tile + place.signs + row * 4; }
  const uint8_t* scales(const Place& place) const { return tile + place.scales + row * 2; }
};

// Signs as right sides, `kColumns` for each depth, made in the order in which they are multiplied: of every strip, for every unit, all depths.
template <int kColumns>
class Signs {
  static constexpr int64_t kSize = kColumns * kTileBytes, kKept = 4, kEarly = 2;  // depths: what was just made is not to be waited for

 public:
  static constexpr int64_t kBytes = kKept * kSize;

  // Of strips from `row` to `last`, made in `bytes`, kBytes of them; the first depths at once.
  BIMOS_AVX512 Signs(uint8_t* bytes, const Plane& plane, const Place* places, int64_t count, int64_t units, int64_t row, int64_t last)
      : bytes_(bytes), plane_(plane), row_tile_(bimos::tile_bytes(Layout::rows64, plane)), places_(places), end_(places + count), place_(places), units_(units),
        row_(row), last_(last) {
    find();
    for (int64_t depth = -kEarly; depth < 0; ++depth) {
      make<0>(depth);
      make<1>(depth);
      make<2>(depth);
      make<3>(depth);
    }
  }

  uint8_t* at(int64_t depth) const { return bytes_ + (depth & (kKept - 1)) * kSize; }

  // A quarter of what is to be ready kEarly depths on. Where the last depth has 32 inputs, digits behind them are zeros: signs may be anything.
  template <int kQuarter>
  BIMOS_AVX512 BIMOS_INLINE void make(int64_t depth) {
    if (from_ == nullptr) return;
    constexpr int kColumn = kQuarter * kColumns / 4;
    const uint8_t* from = from_ + 64 * kColumn;
    uint8_t* to = at(depth + kEarly) + kColumn * kTileBytes;
    if (kColumns == 4 || kQuarter % 2 == 0) expand(from, to);
    if ((kColumns == 4 || kQuarter % 2 == 1) && is_whole_) expand(from + 256, to + kTileBytes / 2);
    if (kQuarter == 3) go_on();
  }

 private:
  BIMOS_INLINE void go_on() {
    if (++depth_ < place_->depths) {
      from_ += 512;
      is_whole_ = 2 * depth_ + 1 < place_->steps;
    } else {
      find_next();
    }
  }

  void find() {
    from_ = Strip(plane_, row_tile_, row_).signs(*place_);
    is_whole_ = place_->steps > 1;
    depth_ = 0;
  }

  void find_next() {
    if (++place_ == end_) {
      place_ = places_;
      if (++unit_ == units_) {
        unit_ = 0;
        row_ += kColumns * kSixteen;
      }
    }
    if (row_ < last_) {
      find();
    } else {
      from_ = nullptr;
    }
  }

  uint8_t* const bytes_;
  const Plane& plane_;
  const int64_t row_tile_;
  const Place *const places_, *const end_, *place_;
  const int64_t units_;
  int64_t row_, unit_ = 0, depth_ = 0;
  const int64_t last_;
  const uint8_t* from_ = nullptr;  // null when all is made
  bool is_whole_ = false;
};

}  // namespace
}  // namespace bimos::matrices
#endif
