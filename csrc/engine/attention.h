// Query heads over the cached keys and values of the head that they share (grouped-query attention): both are read once for all of them.
// For maths.cpp alone: compiled once for every width of vectors.
#pragma once

#include "../vectors.h"
#include "maths.h"

namespace bimos::maths {
namespace {

template <typename T>
struct Cached {
  const T* data;
  const float* scales;  // null for bfloat16

  BIMOS_INLINE Floats load(int64_t at, int64_t count) const { return bimos::load(data + at, count); }
};

// scores[h][p] = q_h k_p * scale, sixteen positions at a time.
template <int kCount, typename T>
BIMOS_INLINE void score(const Attention& a, Cached<T> keys) {
  const int64_t n = a.n, seen = a.last - a.first, whole = n / kWidth * kWidth;
  for (int64_t p = a.first; p < a.last; p += kWidth) {
    const int64_t count = a.last - p < kWidth ? a.last - p : kWidth;
    Floats parts[kCount][kWidth] = {};
    for (int64_t i = 0; i < count; ++i) {
      Floats sums[kCount] = {};
      const int64_t row = (p + i) * n;
      for (int64_t j = 0; j < whole; j += kWidth) {
        const Floats key = keys.load(row + j, kWidth);
        for (int h = 0; h < kCount; ++h) sums[h] += load(a.query + h * a.stride + j, kWidth) * key;
      }
      if (whole < n) {
        const Floats key = keys.load(row + whole, n - whole);
        for (int h = 0; h < kCount; ++h) sums[h] += load(a.query + h * a.stride + whole, n - whole) * key;
      }
      for (int h = 0; h < kCount; ++h) parts[h][i] = sums[h];
    }
    for (int h = 0; h < kCount; ++h) {
      Floats sums = sums_of(parts[h]) * spread(a.scale);
      if (keys.scales != nullptr) sums *= load(keys.scales + p, count);
      store(sums, a.scores + h * seen + (p - a.first), count);
    }
  }
}

// out_h = sum_p scores[h][p] v_p over columns [from, from + width), width <= kVectors * kWidth.
template <int kCount, int kVectors, typename T>
BIMOS_INLINE void mix_columns(const Attention& a, Cached<T> values, int64_t from, int64_t width) {
  const int64_t seen = a.last - a.first;
  Floats sums[kCount][kVectors] = {};
  for (int64_t p = 0; p < seen; ++p) {
    const int64_t row = (a.first + p) * a.n + from;
    Floats share[kCount];
    for (int h = 0; h < kCount; ++h) share[h] = spread(a.scores[h * seen + p]);
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = values.load(row + v * kWidth, width - v * kWidth);
      for (int h = 0; h < kCount; ++h) sums[h][v] += share[h] * value;
    }
  }
  for (int h = 0; h < kCount; ++h)
    for (int v = 0; v < kVectors; ++v) store(sums[h][v], a.out + h * a.stride + from + v * kWidth, width - v * kWidth);
}

template <int kCount, typename T>
BIMOS_INLINE void attend_heads(const Attention& a, Cached<T> keys, Cached<T> values) {
  const int64_t n = a.n, seen = a.last - a.first;
  score<kCount>(a, keys);
  for (int h = 0; h < kCount; ++h) {
    float* scores = a.scores + h * seen;
    const int64_t even = seen / kWidth * kWidth;  // the rest one by one
    Floats highest = spread(scores[0]), sum{};
    for (int64_t p = 0; p < even; p += kWidth) highest = larger(load(scores + p, kWidth), highest);
    float most = largest_of(highest);
    for (int64_t p = even; p < seen; ++p) most = scores[p] > most ? scores[p] : most;
    for (int64_t p = 0; p < even; p += kWidth) {
      const Floats share = exponential(load(scores + p, kWidth) - most);
      sum += share;
      store(share, scores + p, kWidth);
    }
    float total = sum_of(sum);
    if (even < seen) {
      const Floats share = exponential(load(scores + even, seen - even) - most);
      store(share, scores + even, seen - even);
      for (int64_t p = even; p < seen; ++p) total += scores[p];
    }
    const float inverse = 1.0F / total;
    vectors(seen, [&](int64_t p, int64_t count) BIMOS_ALWAYS {
      const Floats share = load(scores + p, count) * inverse;
      store(values.scales == nullptr ? share : share * load(values.scales + a.first + p, count), scores + p, count);
    });
  }
  constexpr int kVectors = 4;
  int64_t j = 0;
  for (; j + kVectors * kWidth <= n; j += kVectors * kWidth) mix_columns<kCount, kVectors>(a, values, j, int64_t{kVectors * kWidth});
  for (; j < n; j += kWidth) mix_columns<kCount, 1>(a, values, j, n - j);
}

template <typename T>
BIMOS_INLINE void attend_cached(const Attention& a, Cached<T> keys, Cached<T> values) {
  switch (a.heads) {
    case 1: return attend_heads<1>(a, keys, values);
    case 2: return attend_heads<2>(a, keys, values);
    case 3: return attend_heads<3>(a, keys, values);
    default: return attend_heads<kHeads>(a, keys, values);
  }
}

// softmax(q k^T * scale) v
BIMOS_INLINE void attend(const Attention& a) {
  if (a.keys.halves != nullptr) {
    attend_cached<uint16_t>(a, {a.keys.halves, nullptr}, {a.values.halves, nullptr});
  } else {
    attend_cached<int8_t>(a, {a.keys.bytes, a.keys.scale}, {a.values.bytes, a.values.scale});
  }
}

}  // namespace
}  // namespace bimos::maths
