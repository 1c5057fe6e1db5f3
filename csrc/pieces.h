// How inputs are divided for products by the matrix unit (matrices.h).
#pragma once

#include <algorithm>

#include "matrices.h"
#include "tiles.h"

#ifdef BIMOS_X86
#include <immintrin.h>
#endif

namespace bimos::matrices {

constexpr int64_t kPiece = 1152;  // inputs that share a step, at most
constexpr int64_t kDepth = 64;    // inputs of a tile
constexpr int64_t kTileBytes = kTile * kDepth;

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

// Numbers that an input is made of, at most.
inline int64_t numbers_of(const Plane& plane) { return plane.int8 ? 1 : 3; }

#ifdef BIMOS_X86
// The first `n` lanes, all or none.
BIMOS_AVX512 inline __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1U << n) - 1); }
#endif

}  // namespace bimos::matrices
