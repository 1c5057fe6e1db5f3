// Products of a plane with some tokens or many by the matrix unit (amx.h): signs become bytes of +1 and -1, a strip of rows at a time, while
// they are multiplied, and inputs whole numbers by pieces of up to 1152,
//
//   x = step (256 high + low),  step = max |x| / 32512      digits in -128..127, a product each
//   x = step (256 high + low + lowest / 256)                where a few inputs are far larger than the rest
//   x = step high,              step = max |x| / 127        with activations of 8 bits
//
// Sums of a piece are exact; pieces add up in float32. Tokens come in tiles of 16, one for each digit; up to eight have both of the first in one.
#pragma once

#include <cstddef>

#include "amx.h"
#include "level.h"

namespace bimos::matrices {

constexpr int64_t kFewest = 5, kFewestInt8 = 7;  // tokens for which it pays: with fewer, making signs bytes takes longer than looking sums up
constexpr int64_t kTile = amx::kRows;

// How many tokens to take at a time: no more than the second cache has room for beside what else is read.
int64_t most_tokens(int64_t in);

// Level::dots and Level::mix of several tokens: `rows`, which are float16, are read once for some of them. logits [tokens, experts].
void dots(const float* x, int64_t x_stride, int64_t tokens, const uint16_t* rows, int64_t experts, int64_t n, float* logits);
void mix(const float* x, int64_t x_stride, const float* gates, int64_t tokens, const uint16_t* rows, int64_t experts, int64_t stride, int64_t n,
         float* out, int64_t out_stride);

// Whether `tokens` in all have high and low digits in the same tile, the low ones' rows behind the others'.
inline bool is_paired(const Plane& plane, int64_t tokens) { return !plane.int8 && 2 * tokens <= kTile; }

// Whether they are one left side for each depth: signs are then used once.
inline bool is_one_left(const Plane& plane, int64_t tokens) { return plane.int8 ? tokens <= kTile : is_paired(plane, tokens); }

// What `prepare` writes for a tile of tokens: bytes that begin at a line of the cache, and as many floats.
size_t tile_bytes(const Plane& plane);
size_t tile_floats(const Plane& plane);

// A tile of `count` tokens of `tokens` in all, `stride` values from one to the next.
void prepare(const float* x, int64_t stride, int64_t count, int64_t tokens, const Plane& plane, uint8_t* tile, float* steps);

constexpr int64_t kMostMixed = 8;

// Scales of rows, float16 [experts, out], and by how much each counts for a token, [tokens, experts]; no more than kMostMixed experts.
struct Mixed {
  const float* gates;
  const uint16_t* scales;
  int64_t experts, out;
};

// y[t, r] = sum_j sign[r, j] x[t, j] for the rows of row tiles [first, last), as Level::product has it, times `mixed` if that is not null;
// the tiles follow one another.
void product(const Plane& plane, int64_t first, int64_t last, const uint8_t* tiles, const float* steps, int64_t tokens, const Mixed* mixed, float* y,
             int64_t stride);

}  // namespace bimos::matrices
