#include "flash.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "room.h"
#include "vectors.h"

namespace bimos::flash {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// c [kRows, 16 kVectors] += a b over `depth`; element (i, k) of a is a[i * row_step + k * step], b has rows of `b_stride`.
template <int kRows, int kVectors>
BIMOS_INLINE void tile(int64_t depth, const float* a, int64_t row_step, int64_t step, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  Floats sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) sums[i][v] = load(c + i * c_stride + v * kWidth, kWidth);
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + k * b_stride + v * kWidth, kWidth);
    for (int i = 0; i < kRows; ++i) {
      const float value = a[i * row_step + k * step];
      for (int v = 0; v < kVectors; ++v) sums[i][v] += value * row[v];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) store(sums[i][v], c + i * c_stride + v * kWidth, kWidth);
}

// The same for `rows`, rounded up to whole tiles, and any multiple of 16 columns.
template <int kRows, int kVectors>
BIMOS_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row_step, int64_t step, const float* b, int64_t b_stride, float* c,
                           int64_t c_stride) {
  int64_t j = 0;
  for (; j + kVectors * kWidth <= columns; j += kVectors * kWidth)
    for (int64_t i = 0; i < rows; i += kRows)
      tile<kRows, kVectors>(depth, a + i * row_step, row_step, step, b + j, b_stride, c + i * c_stride + j, c_stride);
  for (; j < columns; j += kWidth)
    for (int64_t i = 0; i < rows; i += kRows)
      tile<kRows, 1>(depth, a + i * row_step, row_step, step, b + j, b_stride, c + i * c_stride + j, c_stride);
}

template <typename T>
const T* row_of(const Heads& heads, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(heads.data) + batch * heads.batch + head * heads.head + token * heads.token;
}

// Tokens [first, first + kBlock) of a head as float32 times `factor`, rows of `width`; zeros where nothing is.
template <typename T>
BIMOS_INLINE void read(const Heads& heads, int64_t batch, int64_t head, int64_t first, int64_t tokens, int64_t n, int64_t width, float factor, float* to) {
  for (int64_t i = 0; i < kBlock; ++i, to += width) {
    if (first + i >= tokens) {
      std::memset(to, 0, static_cast<size_t>(width) * 4);
      continue;
    }
    const T* from = row_of<T>(heads, batch, head, first + i);
    for (int64_t j = 0; j < width; j += kWidth) store(j < n ? load(from + j, std::min<int64_t>(kWidth, n - j)) * factor : Floats{}, to + j, kWidth);
  }
}

template <typename T>
BIMOS_INLINE void write(const float* from, int64_t rows, int64_t n, int64_t width, T* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += kWidth) store(load(from + i * width + j, kWidth), to + i * stride + j, std::min<int64_t>(kWidth, n - j));
}

// [kBlock, width] to [width, kBlock].
BIMOS_INLINE void transpose(const float* from, int64_t width, float* to) {
  for (int64_t j = 0; j < width; ++j)
    for (int64_t i = 0; i < kBlock; ++i) to[j * kBlock + i] = from[i * width + j];
}

// Queries of a block at positions `first`, `first + 1`, ..: each sees the last `window` keys up to its own position.
struct Seen {
  int64_t first, window;

  int64_t most(int64_t i) const { return first + i; }
  int64_t least(int64_t i) const { return std::max<int64_t>(0, first + i - window + 1); }

  // What row i of scores of keys [at, at + kBlock) must not see becomes -infinity.
  void hide(float* scores, int64_t i, int64_t at) const {
    for (int64_t p = std::max<int64_t>(0, most(i) + 1 - at); p < kBlock; ++p) scores[p] = -kInfinity;
    for (int64_t p = 0; p < std::min(kBlock, least(i) - at); ++p) scores[p] = -kInfinity;
  }
};

// A block of queries over the blocks of keys that it sees: sums of values, and what they are to be divided by.
struct Sums {
  float *sums, *scores;  // [kBlock, width], [kBlock, kBlock]
  float most[kBlock], total[kBlock];

  template <int kRows, int kVectors>
  BIMOS_INLINE void add(const float* query, int64_t rows, int64_t n, int64_t width, const float* keys, const float* values, Seen seen) {
    std::memset(sums, 0, static_cast<size_t>(kBlock * width) * 4);
    std::fill_n(most, kBlock, -kInfinity);
    std::fill_n(total, kBlock, 0.0F);
    for (int64_t k = seen.least(0) / kBlock; k <= seen.most(rows - 1) / kBlock; ++k) {
      std::memset(scores, 0, kBlock * kBlock * 4);
      multiply<kRows, kVectors>(rows, kBlock, n, query, width, 1, keys + k * kBlock * width, kBlock, scores, kBlock);
      const bool all = (k + 1) * kBlock - 1 <= seen.most(0) && k * kBlock >= seen.least(rows - 1);
      for (int64_t i = 0; i < rows; ++i) {
        if (!all) seen.hide(scores + i * kBlock, i, k * kBlock);
        weigh(i, width);
      }
      multiply<kRows, kVectors>(rows, width, kBlock, scores, kBlock, 1, values + k * kBlock * width, width, sums, width);
    }
  }

  // Scores of row i to exponentials under the largest so far; earlier sums follow it.
  BIMOS_INLINE void weigh(int64_t i, int64_t width) {
    float* row = scores + i * kBlock;
    Floats highest = load(row, kWidth), sum{};
    for (int64_t p = kWidth; p < kBlock; p += kWidth) highest = larger(load(row + p, kWidth), highest);
    const float before = most[i], now = std::max(before, largest_of(highest));
    const float under = now == -kInfinity ? 0.0F : now;  // nothing seen yet
    for (int64_t p = 0; p < kBlock; p += kWidth) {
      const Floats share = exponential(load(row + p, kWidth) - under);
      sum += share;
      store(share, row + p, kWidth);
    }
    most[i] = now;
    if (now == before) {
      total[i] += sum_of(sum);
      return;
    }
    const float factor = exponential(spread(before - now))[0];
    total[i] = total[i] * factor + sum_of(sum);
    for (int64_t j = 0; j < width; j += kWidth) store(load(sums + i * width + j, kWidth) * factor, sums + i * width + j, kWidth);
  }

  BIMOS_INLINE void divide(int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; ++i) {
      const float inverse = 1.0F / total[i];
      for (int64_t j = 0; j < width; j += kWidth) store(load(sums + i * width + j, kWidth) * inverse, sums + i * width + j, kWidth);
    }
  }
};

template <int kRows, int kVectors, typename T>
BIMOS_INLINE void forward_group(const Problem& problem, int64_t batch, int64_t group) {
  const int64_t tokens = problem.tokens, n = problem.n, width = up(n, kWidth), blocks = up(tokens, kBlock) / kBlock, shared = problem.heads / problem.key_heads;
  const int64_t block = kBlock * width;
  Room room(2 * blocks * block + 2 * block + kBlock * kBlock);
  float *keys = room.floats(blocks * block), *values = room.floats(blocks * block), *query = room.floats(block);
  Sums result{room.floats(block), room.floats(kBlock * kBlock), {}, {}};
  for (int64_t k = 0; k < blocks; ++k) {
    read<T>(problem.key, batch, group, k * kBlock, tokens, n, width, 1.0F, query);
    transpose(query, width, keys + k * block);
    read<T>(problem.value, batch, group, k * kBlock, tokens, n, width, 1.0F, values + k * block);
  }
  for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
    for (int64_t first = 0; first < tokens; first += kBlock) {
      const int64_t rows = std::min(kBlock, tokens - first);
      read<T>(problem.query, batch, head, first, tokens, n, width, problem.scale, query);
      result.add<kRows, kVectors>(query, rows, n, width, keys, values, {first, kEndless});
      result.divide(rows, width);
      float* lse = problem.lse + (batch * problem.heads + head) * tokens + first;
      for (int64_t i = 0; i < rows; ++i) lse[i] = result.most[i] + std::log(result.total[i]);
      write(result.sums, rows, n, width, const_cast<T*>(row_of<T>(problem.out, batch, head, first)), problem.out.token);
    }
  }
}

// Positions [first, first + kBlock) of a cached head as float32, rows of `width`.
BIMOS_INLINE void recall(const maths::Cache& cache, int64_t first, int64_t length, int64_t n, int64_t width, float* to) {
  for (int64_t p = first; p < first + kBlock; ++p, to += width) {
    if (p >= length) {
      std::memset(to, 0, static_cast<size_t>(width) * 4);
      continue;
    }
    for (int64_t j = 0; j < width; j += kWidth) {
      const int64_t count = std::clamp<int64_t>(n - j, 0, kWidth);
      const Floats value = count == 0 ? Floats{} : cache.halves != nullptr ? load(cache.halves + p * n + j, count) : load(cache.bytes + p * n + j, count) * cache.scale[p];
      store(value, to + j, kWidth);
    }
  }
}

template <int kRows, int kVectors>
BIMOS_INLINE void prompt_blocks(const Prompt& prompt, const int64_t* mine, int64_t count) {
  const int64_t n = prompt.n, width = up(n, kWidth), block = kBlock * width, length = prompt.past + prompt.tokens;
  const int64_t from = std::max<int64_t>(0, prompt.past + mine[0] * kBlock - prompt.window + 1) / kBlock;  // what no query sees is not made
  const int64_t to = up(std::min(length, prompt.past + (mine[count - 1] + 1) * kBlock), kBlock) / kBlock;
  Room room(2 * (to - from) * block + 2 * block + kBlock * kBlock);
  float *keys = room.floats((to - from) * block), *values = room.floats((to - from) * block), *query = room.floats(block);
  Sums result{room.floats(block), room.floats(kBlock * kBlock), {}, {}};
  for (int64_t k = from; k < to; ++k) {
    recall(prompt.keys, k * kBlock, length, n, width, query);
    transpose(query, width, keys + (k - from) * block);
    recall(prompt.values, k * kBlock, length, n, width, values + (k - from) * block);
  }
  keys -= from * block;  // so that blocks go by their position
  values -= from * block;
  for (int64_t head = 0; head < prompt.heads; ++head) {
    const Heads queries{prompt.query + head * n, 0, 0, prompt.stride};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = mine[i] * kBlock, rows = std::min(kBlock, prompt.tokens - first);
      read<float>(queries, 0, 0, first, prompt.tokens, n, width, prompt.scale, query);
      result.add<kRows, kVectors>(query, rows, n, width, keys, values, {prompt.past + first, prompt.window});
      result.divide(rows, width);
      write(result.sums, rows, n, width, prompt.out + first * prompt.stride + head * n, prompt.stride);
    }
  }
}

template <int kRows, int kVectors, typename T>
BIMOS_INLINE void backward_group(const Problem& problem, int64_t batch, int64_t group) {
  const int64_t tokens = problem.tokens, n = problem.n, width = up(n, kWidth), blocks = up(tokens, kBlock) / kBlock, shared = problem.heads / problem.key_heads;
  const int64_t block = kBlock * width;
  Room room(5 * blocks * block + 3 * block + 2 * kBlock * kBlock);
  float *keys = room.floats(blocks * block), *keys_turned = room.floats(blocks * block), *values_turned = room.floats(blocks * block);
  float *of_keys = room.floats(blocks * block), *of_values = room.floats(blocks * block);
  float *query = room.floats(block), *grad = room.floats(block), *of_query = room.floats(block);
  float *shares = room.floats(kBlock * kBlock), *slopes = room.floats(kBlock * kBlock);
  float lse[kBlock], delta[kBlock];
  for (int64_t k = 0; k < blocks; ++k) {
    read<T>(problem.value, batch, group, k * kBlock, tokens, n, width, 1.0F, query);
    transpose(query, width, values_turned + k * block);
    read<T>(problem.key, batch, group, k * kBlock, tokens, n, width, 1.0F, keys + k * block);
    transpose(keys + k * block, width, keys_turned + k * block);
  }
  std::memset(of_keys, 0, static_cast<size_t>(blocks * block) * 4);
  std::memset(of_values, 0, static_cast<size_t>(blocks * block) * 4);
  for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
    const int64_t place = (batch * problem.heads + head) * tokens;
    for (int64_t q = 0; q < blocks; ++q) {
      const int64_t first = q * kBlock, rows = std::min(kBlock, tokens - first);
      read<T>(problem.query, batch, head, first, tokens, n, width, problem.scale, query);
      read<T>(problem.grad, batch, head, first, tokens, n, width, 1.0F, grad);
      read<T>(problem.out, batch, head, first, tokens, n, width, 1.0F, of_query);
      for (int64_t i = 0; i < kBlock; ++i) {  // rows that are not there have no share in anything
        lse[i] = i < rows ? problem.lse[place + first + i] : kInfinity;
        Floats sum{};
        for (int64_t j = 0; j < width; j += kWidth) sum += load(grad + i * width + j, kWidth) * load(of_query + i * width + j, kWidth);
        delta[i] = sum_of(sum);
      }
      std::memset(of_query, 0, static_cast<size_t>(block) * 4);
      for (int64_t k = 0; k <= q; ++k) {
        std::memset(shares, 0, kBlock * kBlock * 4);
        std::memset(slopes, 0, kBlock * kBlock * 4);
        multiply<kRows, kVectors>(kBlock, kBlock, n, query, width, 1, keys_turned + k * block, kBlock, shares, kBlock);
        multiply<kRows, kVectors>(kBlock, kBlock, n, grad, width, 1, values_turned + k * block, kBlock, slopes, kBlock);
        for (int64_t i = 0; i < kBlock; ++i) {
          float *share = shares + i * kBlock, *slope = slopes + i * kBlock;
          if (k == q) Seen{first, kEndless}.hide(share, i, k * kBlock);
          for (int64_t p = 0; p < kBlock; p += kWidth) {
            const Floats probability = exponential(load(share + p, kWidth) - lse[i]);
            store(probability, share + p, kWidth);
            store(probability * (load(slope + p, kWidth) - delta[i]), slope + p, kWidth);
          }
        }
        multiply<kRows, kVectors>(kBlock, width, kBlock, shares, 1, kBlock, grad, width, of_values + k * block, width);
        multiply<kRows, kVectors>(kBlock, width, kBlock, slopes, 1, kBlock, query, width, of_keys + k * block, width);
        multiply<kRows, kVectors>(kBlock, width, kBlock, slopes, kBlock, 1, keys + k * block, width, of_query, width);
      }
      for (int64_t j = 0; j < block; j += kWidth) store(load(of_query + j, kWidth) * problem.scale, of_query + j, kWidth);
      write(of_query, rows, n, width, static_cast<T*>(problem.of_query) + (place + first) * n, n);
    }
  }
  const int64_t place = (batch * problem.key_heads + group) * tokens * n;
  write(of_keys, tokens, n, width, static_cast<T*>(problem.of_key) + place, n);
  write(of_values, tokens, n, width, static_cast<T*>(problem.of_value) + place, n);
}

// Rows of a tile, and vectors of a row: what the registers hold.
constexpr int kTall = 4, kWide = kWidth == 16 ? 4 : 2;

template <typename T>
Functions of() {
  return {of_width<kWidth, forward_group<kTall, kWide, T>>(), of_width<kWidth, backward_group<kTall, kWide, T>>()};
}

}  // namespace

Functions BIMOS_HERE::functions(bool is_float) { return is_float ? of<float>() : of<uint16_t>(); }

PromptFunction BIMOS_HERE::prompt() { return of_width<kWidth, prompt_blocks<kTall, kWide>>(); }

}  // namespace bimos::flash
