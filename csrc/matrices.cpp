// The matrix unit multiplies a unit of work at a time: four sums, of [left sides, right sides] = [2, 2] or [1, 4]. Between its products the
// vector unit makes the signs of later ones bytes, anew for every unit, and pays what the unit before has left owing. Both take no longer than the
// products do, as long as the first cache holds what they write, and nothing is read soon after it was written: a tile is not loaded before all
// that was written to it has left the processor's queue, behind products that are still under way.
#include <algorithm>

#include "matrices_multiply.h"
#include "matrices_signs.h"
#include "room.h"

namespace bimos::matrices {

#ifdef BIMOS_X86
namespace {

// `kLeft` left sides: both digits of all tokens in one (`kPaired`), or of a tile of tokens in two, and the third digit in one more; or, with int8, one of
// all tokens, or two tiles.
template <bool kInt8, bool kPaired, int kLeft>
BIMOS_AVX512 void product_of(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, const Mixed* mixed,
                             float* y, int64_t stride) {
  constexpr int kColumns = kLeft == 1 ? 4 : 2;
  constexpr int64_t kStrip = kColumns * kSixteen, kUnit = kInt8 && kLeft == 2 ? 2 * kTile : kTile;
  constexpr bool kMayBeFine = !kInt8 && kLeft == (kPaired ? 2 : 3);
  const Pieces pieces(plane);
  const int64_t apart = pieces.most_depths() * kTileBytes, count = pieces.count(), experts = mixed == nullptr ? 0 : mixed->experts;
  const auto bytes = static_cast<int64_t>(tile_bytes(plane)), floats = static_cast<int64_t>(tile_floats(plane));
  const int64_t units = ceil_div(tokens, kUnit), kept = Signs<kColumns>::kBytes / 4;
  constexpr int64_t kPlace = sizeof(Place) / 4;
  Room room(kept + kUnit * kStrip + 2 * experts * kStrip + count * kPlace + 4 * Room::kLine);
  auto* bytes_of_signs = reinterpret_cast<uint8_t*>(room.words(kept));
  float* between = room.floats(kUnit * kStrip);       // sums of a unit's pieces so far
  float* scales = room.floats(2 * experts * kStrip);  // of a strip, and of the one before, which may still be owed
  auto* places = reinterpret_cast<Place*>(room.words(count * kPlace));
  const int64_t place_count = find_places(plane, pieces, places), row_tile = bimos::tile_bytes(Layout::rows64, plane);
  Sums sums;
  Owed<kInt8, kColumns> owed{};
  owed.sums = sums.values;
  owed.low = sums.values + (kPaired ? tokens * kSixteen : kColumns * kSum);
  owed.to_steps = floats;
  owed.stride_before = kStrip;
  owed.experts = experts;
  owed.grouped = plane.grouped;
  const amx::Tiles all(kPaired ? 2 * tokens : kTile, kRights<kLeft>);
  Signs<kColumns> signs(bytes_of_signs, plane, places, place_count, units, first * 64, last * 64);
  int64_t depth = 0;  // of all so far
  for (int64_t row = first * 64; row < last * 64; row += kStrip) {
    float* mine = scales + row / kStrip % 2 * experts * kStrip;
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t r = 0; r < kStrip; r += 16)
        _mm512_storeu_ps(mine + e * kStrip + r, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(mixed->out - row - r), mixed->scales + e * mixed->out + row + r)));
    const Strip strip(plane, row_tile, row);
    for (int64_t token = 0; token < tokens; token += kUnit) {
      for (const Place* place = places; place < places + place_count; ++place) {
        const uint8_t* left = tiles + token / kTile * bytes + place->piece * apart * numbers_of(plane);
        const float* unit_steps = steps + token / kTile * floats;
        const bool is_last = place + 1 == places + place_count, is_fine = kMayBeFine && unit_steps[count * kTile + place->piece] != 0;
        constexpr int kFewer = kMayBeFine ? kLeft - 1 : 1;
        if (kMayBeFine ? is_fine : kUnit == kTile || token + kTile < tokens) {
          multiply<kLeft, kColumns>(left, kInt8 ? bytes : apart, signs, depth, place->depths, sums.values, owed);
        } else {
          multiply<kFewer, kColumns>(left, apart, signs, depth, place->depths, sums.values, owed);
        }
        depth += place->depths;
        owed.next = 0;
        owed.tokens = std::min(kUnit, tokens - token);
        owed.lowest = is_fine ? sums.values + (kLeft - 1) * kColumns * kSum : nullptr;
        owed.steps = unit_steps + place->piece * kTile;
        owed.before = place == places ? nullptr : between;
        owed.to = is_last ? y + token * stride + row : between;
        owed.stride = is_last ? stride : kStrip;
        owed.scales = is_last && experts > 0 ? mine : nullptr;
        owed.gates = experts > 0 ? mixed->gates + token * experts : nullptr;
        for (int c = 0; c < kColumns && plane.grouped; ++c)
          owed.group_scales[c] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(strip.scales(*place) + 32 * c)));
      }
    }
  }
  owed.pay(owed.tokens);
}

}  // namespace

void product(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, const Mixed* mixed, float* y,
             int64_t stride) {
  const bool one = is_one_left(plane, tokens);
  const bool fine = !plane.int8 && any_is_fine(steps, static_cast<int64_t>(tile_floats(plane)), ceil_div(tokens, kTile), Pieces(plane).count());
  const auto function = plane.int8 ? (one ? product_of<true, false, 1> : product_of<true, false, 2>)
                        : one      ? (fine ? product_of<false, true, 2> : product_of<false, true, 1>)
                                   : (fine ? product_of<false, false, 3> : product_of<false, false, 2>);
  function(plane, first, last, tiles, steps, tokens, mixed, y, stride);
}
#else
void product(const Plane&, int64_t, int64_t, const uint8_t*, const float*, int64_t, const Mixed*, float*, int64_t) {}
#endif

}  // namespace bimos::matrices
