// The inner loop of the matrix unit's products. For matrices.cpp and bytes.cpp alone.
#pragma once

#include "matrices_owed.h"

#ifdef BIMOS_X86
namespace bimos::matrices {
namespace {

// The first of the tiles that are right sides. All have 16 rows where both digits are not in one: pieces without a third digit take tile 6 for a right side.
template <int kLeft>
constexpr int kRights = kLeft == 3 ? 7 : kLeft == 2 ? 6 : 5;

// sums [kLeft, kColumns, 16, 16] of left sides, which lie `apart` bytes from one another, with right sides of depths from `depth` on, which `right` has.
// A quarter of what it has to do for later ones is done behind every product or two, and behind a depth a part of what is owed.
template <int kLeft, int kColumns, typename Right, typename Owed>
BIMOS_AVX512 BIMOS_INLINE void multiply(const uint8_t* left, [[maybe_unused]] int64_t apart, Right& right, int64_t depth, int64_t depths, int32_t* sums,
                                        Owed& owed) {
  constexpr int kSums = kLeft * kColumns;
  amx::zero<0>();
  amx::zero<1>();
  if constexpr (kSums >= 4) {
    amx::zero<2>();
    amx::zero<3>();
  }
  if constexpr (kSums == 6) {
    amx::zero<4>();
    amx::zero<5>();
  }
  for (int64_t k = depth; k < depth + depths; ++k, left += kTileBytes) {
    const uint8_t* tile = right.at(k);
    if constexpr (kSums == 6) {  // left sides twice, for want of tiles
      amx::load<7>(tile, kDepth);
      amx::load<6>(left, kDepth);
      amx::add_bytes<0, 6, 7>();
      amx::load<6>(left + apart, kDepth);
      amx::add_bytes<2, 6, 7>();
      right.template make<0>(k);
      amx::load<6>(left + 2 * apart, kDepth);
      amx::add_bytes<4, 6, 7>();
      right.template make<1>(k);
      amx::load<7>(tile + kTileBytes, kDepth);
      amx::load<6>(left, kDepth);
      amx::add_bytes<1, 6, 7>();
      amx::load<6>(left + apart, kDepth);
      amx::add_bytes<3, 6, 7>();
      right.template make<2>(k);
      amx::load<6>(left + 2 * apart, kDepth);
      amx::add_bytes<5, 6, 7>();
    } else {
      amx::load<4>(left, kDepth);
      amx::load<6>(tile, kDepth);
      amx::add_bytes<0, 4, 6>();
      right.template make<0>(k);
      amx::load<7>(tile + kTileBytes, kDepth);
      amx::add_bytes<1, 4, 7>();
      right.template make<1>(k);
      if constexpr (kColumns == 4) {
        amx::load<5>(tile + 2 * kTileBytes, kDepth);
        amx::add_bytes<2, 4, 5>();
      } else if constexpr (kLeft == 2) {
        amx::load<5>(left + apart, kDepth);
        amx::add_bytes<2, 5, 6>();
      }
      right.template make<2>(k);
      if constexpr (kColumns == 4) {
        amx::load<6>(tile + 3 * kTileBytes, kDepth);
        amx::add_bytes<3, 4, 6>();
      } else if constexpr (kLeft == 2) {
        amx::add_bytes<3, 5, 7>();
      }
    }
    right.template make<3>(k);
    if (k > depth) owed.pay_part(depths);
  }
  owed.pay(owed.tokens);
  amx::store<0>(sums, 64);
  amx::store<1>(sums + kSum, 64);
  if constexpr (kSums >= 4) {
    amx::store<2>(sums + 2 * kSum, 64);
    amx::store<3>(sums + 3 * kSum, 64);
  }
  if constexpr (kSums == 6) {
    amx::store<4>(sums + 4 * kSum, 64);
    amx::store<5>(sums + 5 * kSum, 64);
  }
}

struct Sums {
  alignas(64) int32_t values[6 * kSum];
};

// Whether any of the tokens' pieces has a third digit; `floats` from tile to tile of `steps`.
inline bool any_is_fine(const float* steps, int64_t floats, int64_t tiles, int64_t pieces) {
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t piece = 0; piece < pieces; ++piece)
      if (steps[tile * floats + pieces * kTile + piece] != 0) return true;
  return false;
}

}  // namespace
}  // namespace bimos::matrices
#endif
