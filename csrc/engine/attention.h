// Query heads over the cached keys and values of the head that they share (grouped-query attention): both are read once for all of them.
// For maths.cpp alone: compiled once for every width of vectors.
#pragma once

#include "../vectors.h"
#include "maths.h"

namespace bimos::maths {
namespace {

// Keys or values of a head. Two vectors of bfloat16 are read in turns, which is the cheapest way to widen them; so are the queries that they
// are multiplied by, and what is summed up of them is put in order again at the end.
template <typename T>
struct Cached {
  const T* data;
  const float* scales;  // null for bfloat16

  static constexpr bool kInTurns = sizeof(T) == 2;

  BIMOS_INLINE Floats load(int64_t at, int64_t count) const { return bimos::load(data + at, count); }

  BIMOS_INLINE Pair pair(int64_t at) const {
    if constexpr (kInTurns) return load_turns(data + at);
    else return load_pair(data + at);
  }

  // Brings a row of n near.
  BIMOS_INLINE void fetch(int64_t at, int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(data + at + j);
  }

  static BIMOS_INLINE Pair query(const float* from) {
    if constexpr (kInTurns) return load_turns(from);
    else return load_pair(from);
  }

  static BIMOS_INLINE void finish(Pair sums, float* to) {
    if constexpr (kInTurns) return store_turns(sums, to);
    store(sums.first, to, kWidth);
    store(sums.second, to + kWidth, kWidth);
  }
};

constexpr int64_t kPositionsAhead = 32;

// scores[h][p] = q_h k_p * scale, as many positions at a time as a vector has lanes. Meanwhile the values are brought near.
template <int kCount, typename T>
BIMOS_INLINE void score(const Attention& a, Cached<T> keys, Cached<T> values) {
  const int64_t n = a.n, seen = a.last - a.first, whole = n / (2 * kWidth) * (2 * kWidth);
  float* queries = a.scores + kCount * seen;  // of columns below `whole`, as keys are read
  for (int64_t j = 0; j < whole; j += 2 * kWidth) {
    for (int h = 0; h < kCount; ++h) {
      const Pair query = keys.query(a.query + h * a.stride + j);
      store(query.first, queries + kCount * j + 2 * h * kWidth, kWidth);
      store(query.second, queries + kCount * j + (2 * h + 1) * kWidth, kWidth);
    }
  }
  Floats parts[kCount][kWidth];
  for (int64_t p = a.first; p < a.last; p += kWidth) {
    const int64_t count = a.last - p < kWidth ? a.last - p : kWidth;
    for (int64_t i = 0; i < count; ++i) {
      Floats sums[kCount] = {};
      const int64_t row = (p + i) * n;
      const float* query = queries;
      if (p + i + kPositionsAhead < a.last) keys.fetch(row + kPositionsAhead * n, n);
      values.fetch(row, n);
      for (int64_t j = 0; j < whole; j += 2 * kWidth) {
        const Pair key = keys.pair(row + j);
        for (int h = 0; h < kCount; ++h, query += 2 * kWidth) {
          sums[h] += bimos::load(query, kWidth) * key.first;
          sums[h] += bimos::load(query + kWidth, kWidth) * key.second;
        }
      }
      for (int64_t j = whole; j < n; j += kWidth) {
        const int64_t width = n - j < kWidth ? n - j : kWidth;
        const Floats key = keys.load(row + j, width);
        for (int h = 0; h < kCount; ++h) sums[h] += bimos::load(a.query + h * a.stride + j, width) * key;
      }
      for (int h = 0; h < kCount; ++h) parts[h][i] = sums[h];
    }
    for (int64_t i = count; i < kWidth; ++i)
      for (int h = 0; h < kCount; ++h) parts[h][i] = Floats{};
    for (int h = 0; h < kCount; ++h) {
      Floats sums = sums_of(parts[h]) * spread(a.scale);
      if (keys.scales != nullptr) sums *= bimos::load(keys.scales + p, count);
      store(sums, a.scores + h * seen + (p - a.first), count);
    }
  }
}

// out_h = sum_p scores[h][p] v_p over kPairs pairs of vectors of columns from `from` on.
template <int kCount, int kPairs, typename T>
BIMOS_INLINE void mix_columns(const Attention& a, Cached<T> values, int64_t from) {
  const int64_t seen = a.last - a.first;
  Pair sums[kCount][kPairs] = {};
  for (int64_t p = 0; p < seen; ++p) {
    const int64_t row = (a.first + p) * a.n + from;
    Floats share[kCount];
    for (int h = 0; h < kCount; ++h) share[h] = spread(a.scores[h * seen + p]);
    for (int v = 0; v < kPairs; ++v) {
      const Pair value = values.pair(row + 2 * v * kWidth);
      for (int h = 0; h < kCount; ++h) {
        sums[h][v].first += share[h] * value.first;
        sums[h][v].second += share[h] * value.second;
      }
    }
  }
  for (int h = 0; h < kCount; ++h)
    for (int v = 0; v < kPairs; ++v) values.finish(sums[h][v], a.out + h * a.stride + from + 2 * v * kWidth);
}

// The same over `width` columns, no more than a vector has.
template <int kCount, typename T>
BIMOS_INLINE void mix_last(const Attention& a, Cached<T> values, int64_t from, int64_t width) {
  const int64_t seen = a.last - a.first;
  Floats sums[kCount] = {};
  for (int64_t p = 0; p < seen; ++p) {
    const Floats value = values.load((a.first + p) * a.n + from, width);
    for (int h = 0; h < kCount; ++h) sums[h] += spread(a.scores[h * seen + p]) * value;
  }
  for (int h = 0; h < kCount; ++h) store(sums[h], a.out + h * a.stride + from, width);
}

template <int kCount, typename T>
BIMOS_INLINE void attend_heads(const Attention& a, Cached<T> keys, Cached<T> values) {
  const int64_t n = a.n, seen = a.last - a.first;
  score<kCount>(a, keys, values);
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
  constexpr int kPairs = 2;
  int64_t j = 0;
  for (; j + 2 * kPairs * kWidth <= n; j += 2 * kPairs * kWidth) mix_columns<kCount, kPairs>(a, values, j);
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) mix_columns<kCount, 1>(a, values, j);
  for (; j < n; j += kWidth) mix_last<kCount>(a, values, j, n - j < kWidth ? n - j : kWidth);
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
