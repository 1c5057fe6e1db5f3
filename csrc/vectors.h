// Vectors of the compiler, as wide as the processor's: 4, 8 or 16 values. What is written with them is compiled once for every width
// (CMakeLists.txt), as BIMOS_WIDTH says: of wider vectors than a processor has, GCC makes memory.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "targets.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are handed to functions that are always inlined

#ifndef BIMOS_WIDTH
#define BIMOS_WIDTH 16  // for files of AVX-512 alone
#endif

namespace bimos {
inline namespace BIMOS_HERE {

constexpr int kWidth = BIMOS_WIDTH;
using Floats = float __attribute__((vector_size(4 * kWidth)));
using Words = uint32_t __attribute__((vector_size(4 * kWidth)));
using Halves = uint16_t __attribute__((vector_size(2 * kWidth)));
using Chars = int8_t __attribute__((vector_size(kWidth)));
using Integers = int32_t __attribute__((vector_size(4 * kWidth)));
// Two vectors, as words of 64 bits: for what is laid out once, not for inner loops.
using Longs = uint64_t __attribute__((vector_size(8 * kWidth)));

BIMOS_INLINE Floats spread(float value) { return Floats{} + value; }

// Values between memory and a vector: all of it, or the first `count` where there are fewer.
template <typename From, typename To>
BIMOS_INLINE void copy(const From* from, To* to, int64_t count) {
  constexpr size_t kBytes = sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To);
  if (count >= kWidth) {
    std::memcpy(to, from, kBytes);
  } else {
    std::memcpy(to, from, static_cast<size_t>(count) * (kBytes / kWidth));
  }
}

// `count` values, zeros behind them: float32, bfloat16, int8.
BIMOS_INLINE Floats load(const float* from, int64_t count) {
  Floats values{};
  copy(from, &values, count);
  return values;
}

BIMOS_INLINE Floats load(const uint16_t* from, int64_t count) {
  Halves halves{};
  copy(from, &halves, count);
  return std::bit_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

BIMOS_INLINE Floats load(const int8_t* from, int64_t count) {
  Chars bytes{};
  copy(from, &bytes, count);
  return __builtin_convertvector(__builtin_convertvector(bytes, Integers), Floats);
}

// Two vectors of values that follow each other.
struct Pair {
  Floats first, second;
};

BIMOS_INLINE Pair load_pair(const float* from) { return {load(from, kWidth), load(from + kWidth, kWidth)}; }
BIMOS_INLINE Pair load_pair(const int8_t* from) { return {load(from, kWidth), load(from + kWidth, kWidth)}; }

// In turns: one value to the first, the next to the second. So a word of two bfloat16 becomes two float32 by a shift and a mask.
BIMOS_INLINE Pair load_turns(const uint16_t* from) {
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return {std::bit_cast<Floats>(words << 16), std::bit_cast<Floats>(words & 0xffff0000)};
}

BIMOS_INLINE Pair load_turns(const float* from) {
  Longs longs;
  std::memcpy(&longs, from, sizeof(longs));
  return {std::bit_cast<Floats>(__builtin_convertvector(longs, Words)), std::bit_cast<Floats>(__builtin_convertvector(longs >> 32, Words))};
}

BIMOS_INLINE void store_turns(Pair pair, float* to) {
  const Longs first = __builtin_convertvector(std::bit_cast<Words>(pair.first), Longs);
  const Longs second = __builtin_convertvector(std::bit_cast<Words>(pair.second), Longs);
  const Longs both = first | second << 32;
  std::memcpy(to, &both, sizeof(both));
}

BIMOS_INLINE void store(Floats values, float* to, int64_t count) { copy(&values, to, count); }

BIMOS_INLINE void store(Floats values, uint16_t* to, int64_t count) {  // to nearest even; NaN stays NaN
  const auto bits = std::bit_cast<Words>(values);
  const auto strange = std::bit_cast<Words>(values != values);
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Halves halves = __builtin_convertvector((rounded & ~strange) | (strange & 0x7fc0), Halves);
  copy(&halves, to, count);
}

// `step(j, count)` for every vector of n values; the count is known when it is compiled but for the last.
template <typename Step>
BIMOS_INLINE void vectors(int64_t n, Step step) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) step(j, static_cast<int64_t>(kWidth));
  if (j < n) step(j, n - j);
}

BIMOS_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x to 2e-7 relative, as polynomials do (Cephes); 0 below -87.3, where float32 ends; NaN stays NaN.
BIMOS_INLINE Floats exponential(Floats x) {
  constexpr float kLeast = -87.3F, kMost = 88.3F, kRounder = 12582912.0F;  // 1.5 * 2^23: a sum with it is a whole number in its last bits
  const Floats low = x < kLeast ? spread(kLeast) : x, clamped = low > kMost ? spread(kMost) : low;
  const Floats shifted = clamped * 1.44269504F + kRounder, whole = shifted - kRounder;
  const Floats rest = clamped - whole * 0.693359375F + whole * 2.12194440e-4F;
  Floats sum = rest * 1.9875691500e-4F + 1.3981999507e-3F;
  sum = sum * rest + 8.3334519073e-3F;
  sum = sum * rest + 4.1665795894e-2F;
  sum = sum * rest + 1.6666665459e-1F;
  sum = sum * rest + 5.0000001201e-1F;
  sum = sum * rest * rest + rest + 1.0F;
  const auto power = std::bit_cast<Floats>((std::bit_cast<Words>(shifted) << 23) + 0x3f800000U);
  return x < kLeast ? Floats{} : sum * power;
}

// One value of all lanes: halves are laid on each other until one is left. `join` takes vectors of any width.
template <typename Join>
BIMOS_INLINE float folded(Floats values, Join join) {
#if BIMOS_WIDTH == 16
  const auto low = __builtin_shufflevector(values, values, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto eight = join(low, __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const auto eight = values;
#endif
#if BIMOS_WIDTH >= 8
  const auto four = join(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#else
  const auto four = eight;
#endif
  const auto two = join(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
  return join(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
}

BIMOS_INLINE float largest_of(Floats values) {
  return folded(values, [](auto a, auto b) BIMOS_ALWAYS { return a > b ? a : b; });
}

BIMOS_INLINE float sum_of(Floats values) {
  return folded(values, [](auto a, auto b) BIMOS_ALWAYS { return a + b; });
}

// The sums of as many vectors as a vector has lanes, one a lane: halves of two are laid side by side and added, again and again.
BIMOS_INLINE Floats sums_of(const Floats* rows) {
#if BIMOS_WIDTH == 4
  const Floats a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  const Floats first = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Floats second = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(first, second, 0, 1, 4, 5) + __builtin_shufflevector(first, second, 2, 3, 6, 7);
#elif BIMOS_WIDTH == 8
  Floats twos[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const Floats a = rows[2 * i], b = rows[2 * i + 1];
    twos[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11) + __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats a = twos[2 * i], b = twos[2 * i + 1];
    fours[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 2, 3, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 12, 13, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  Floats twos[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i) {
    const Floats a = rows[2 * i], b = rows[2 * i + 1];
    twos[i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
              __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const Floats a = twos[2 * i], b = twos[2 * i + 1];
    fours[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23) +
               __builtin_shufflevector(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23) +
                __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  return __builtin_shufflevector(eights[0], eights[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(eights[0], eights[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#endif
}

}  // namespace BIMOS_HERE
}  // namespace bimos
