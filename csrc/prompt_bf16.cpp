// Attention of a prompt over a cache by the matrix unit. What the cache holds are values of bfloat16, or bytes, which bfloat16 holds as well;
// queries, and shares of keys, are sums of two: the upper and the lower part of a float32, to 2^-17 of it.
#include <algorithm>
#include <cstring>
#include <limits>

#include "blocks_bf16.h"
#include "flash_bf16.h"
#include "room.h"

namespace bimos::flash {

#ifdef BIMOS_X86
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 32 values as upper and lower parts.
BIMOS_BF16 void split(Floats low, Floats high, uint32_t* upper, uint32_t* lower) {
  const auto above = std::bit_cast<__m512i>(halves(low, high));
  const auto first = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(above)), 16));
  const auto second = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(above, 1)), 16));
  _mm512_storeu_si512(upper, above);
  _mm512_storeu_si512(lower, std::bit_cast<__m512i>(halves(low - std::bit_cast<Floats>(first), high - std::bit_cast<Floats>(second))));
}

// Positions [first, first + kBlock) of a cached head, rows of `width` values, and what each is to be multiplied by.
BIMOS_BF16 void recall(const maths::Cache& cache, int64_t first, int64_t length, int64_t n, int64_t width, uint32_t* words, float* scales) {
  auto* to = reinterpret_cast<uint16_t*>(words);
  for (int64_t i = 0; i < kBlock; ++i, to += width) {
    const int64_t p = first + i, count = p < length ? n : 0;
    scales[i] = count > 0 && cache.halves == nullptr ? cache.scale[p] : 1.0F;
    if (cache.halves != nullptr) {
      if (count > 0) std::memcpy(to, cache.halves + p * n, static_cast<size_t>(count) * 2);
    } else {
      for (int64_t j = 0; j < count; j += kWidth) store(load(cache.bytes + p * n + j, std::min<int64_t>(kWidth, count - j)), to + j, std::min<int64_t>(kWidth, count - j));
    }
    std::memset(to + count, 0, static_cast<size_t>(width - count) * 2);
  }
}

// A block of queries over blocks of keys.
struct Sums {
  float *sums, *scores;              // [kBlock, width], [kBlock, kBlock]
  uint32_t *shares, *shares_below;   // [kBlock, kPairs]: upper and lower parts
  float most[kBlock], total[kBlock];

  // Row i of scores, of which [begin, end) are seen, to shares under the largest so far; earlier sums follow it.
  BIMOS_BF16 void weigh(int64_t i, int64_t begin, int64_t end, const float* of_keys, const float* of_values, int64_t width) {
    float* row = scores + i * kBlock;
    Floats highest = spread(-kInfinity), sum{};
    for (int64_t p = 0; p < kBlock; p += kWidth) store(load(row + p, kWidth) * load(of_keys + p, kWidth), row + p, kWidth);
    for (int64_t p = 0; p < begin; ++p) row[p] = -kInfinity;
    for (int64_t p = end; p < kBlock; ++p) row[p] = -kInfinity;
    for (int64_t p = 0; p < kBlock; p += kWidth) highest = larger(load(row + p, kWidth), highest);
    const float before = most[i], now = std::max(before, _mm512_reduce_max_ps(std::bit_cast<__m512>(highest)));
    const float under = now == -kInfinity ? 0.0F : now;  // nothing seen yet
    for (int64_t p = 0; p < kBlock; p += 2 * kWidth) {
      const Floats low = exponential(load(row + p, kWidth) - under), high = exponential(load(row + p + kWidth, kWidth) - under);
      sum += low + high;
      split(low * load(of_values + p, kWidth), high * load(of_values + p + kWidth, kWidth), shares + i * kPairs + p / 2, shares_below + i * kPairs + p / 2);
    }
    most[i] = now;
    const float added = _mm512_reduce_add_ps(std::bit_cast<__m512>(sum));
    if (now == before) {
      total[i] += added;
      return;
    }
    const float factor = exponential(spread(before - now))[0];
    total[i] = total[i] * factor + added;
    for (int64_t j = 0; j < width; j += kWidth) store(load(sums + i * width + j, kWidth) * factor, sums + i * width + j, kWidth);
  }
};

BIMOS_TARGET void prompt_blocks(const Prompt& prompt, const int64_t* mine, int64_t count) {
  const int64_t n = prompt.n, width = up(n, 2 * kWidth), words = width / 2, block = kBlock * words, length = prompt.past + prompt.tokens;
  const int64_t from = std::max<int64_t>(0, prompt.past + mine[0] * kBlock - prompt.window + 1) / kBlock;  // what no query sees is not made
  const int64_t to = up(std::min(length, prompt.past + (mine[count - 1] + 1) * kBlock), kBlock) / kBlock, blocks = to - from;
  Room room(blocks * (2 * block + 2 * kBlock) + 3 * block + kBlock * (width + kBlock + 2 * kPairs) + 16 * kWidth);
  uint32_t *keys = room.words(blocks * block), *values = room.words(blocks * block), *rows = room.words(block);
  uint32_t *query = room.words(block), *query_below = room.words(block);
  float *of_keys = room.floats(blocks * kBlock), *of_values = room.floats(blocks * kBlock);
  Sums made{room.floats(kBlock * width), room.floats(kBlock * kBlock), room.words(kBlock * kPairs), room.words(kBlock * kPairs), {}, {}};
  for (int64_t k = 0; k < blocks; ++k) {
    recall(prompt.keys, (from + k) * kBlock, length, n, width, rows, of_keys + k * kBlock);
    turn(rows, width, keys + k * block);
    recall(prompt.values, (from + k) * kBlock, length, n, width, rows, of_values + k * kBlock);
    pair_up(rows, width, values + k * block);
  }
  const auto all_words = [&](int64_t) BIMOS_ALWAYS { return words; };
  const auto all_pairs = [&](int64_t) BIMOS_ALWAYS { return kPairs; };
  const amx::Tiles tiles;
  for (int64_t head = 0; head < prompt.heads; ++head) {
    for (int64_t b = 0; b < count; ++b) {
      const int64_t first = mine[b] * kBlock, tokens = std::min(kBlock, prompt.tokens - first), at = prompt.past + first;
      for (int64_t i = 0; i < kBlock; ++i) {
        const float* x = prompt.query + (first + i) * prompt.stride + head * n;
        for (int64_t j = 0; j < width; j += 2 * kWidth) {
          const int64_t low = i < tokens ? std::clamp<int64_t>(n - j, 0, kWidth) : 0, high = i < tokens ? std::clamp<int64_t>(n - j - kWidth, 0, kWidth) : 0;
          split((low > 0 ? load(x + j, low) : Floats{}) * prompt.scale, (high > 0 ? load(x + j + kWidth, high) : Floats{}) * prompt.scale,
                query + i * words + j / 2, query_below + i * words + j / 2);
        }
      }
      std::memset(made.sums, 0, static_cast<size_t>(kBlock * width) * 4);
      std::fill_n(made.most, kBlock, -kInfinity);
      std::fill_n(made.total, kBlock, 0.0F);
      const int64_t least = std::max<int64_t>(0, at - prompt.window + 1) / kBlock;
      for (int64_t k = least; k <= (at + tokens - 1) / kBlock; ++k) {
        const int64_t here = k - from;
        multiply<true, false>(kBlock, kBlock, all_words, query, words, keys + here * block, kBlock, made.scores, kBlock);
        multiply<true, true>(kBlock, kBlock, all_words, query_below, words, keys + here * block, kBlock, made.scores, kBlock);
        for (int64_t i = 0; i < kBlock; ++i) {
          const int64_t end = std::clamp<int64_t>(at + i + 1 - k * kBlock, 0, kBlock);
          const int64_t begin = std::clamp<int64_t>(at + i - prompt.window + 1 - k * kBlock, 0, kBlock);
          made.weigh(i, begin, end, of_keys + here * kBlock, of_values + here * kBlock, width);
        }
        multiply<true, true>(kBlock, width, all_pairs, made.shares, kPairs, values + here * block, width, made.sums, width);
        multiply<true, true>(kBlock, width, all_pairs, made.shares_below, kPairs, values + here * block, width, made.sums, width);
      }
      for (int64_t i = 0; i < tokens; ++i) {
        float* y = prompt.out + (first + i) * prompt.stride + head * n;
        const float inverse = 1.0F / made.total[i];
        for (int64_t j = 0; j < n; j += kWidth) store(load(made.sums + i * width + j, kWidth) * inverse, y + j, std::min<int64_t>(kWidth, n - j));
      }
    }
  }
}

}  // namespace
#endif

PromptFunction reading_for(const char* level) {
#ifdef BIMOS_X86
  if (std::strcmp(level, "amx") == 0) return prompt_blocks;
#endif
  return prompt_for(level);
}

}  // namespace bimos::flash
