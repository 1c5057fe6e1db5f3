// Attention of bfloat16 in training by products of pairs (vdpbf16ps), which sum in float32: twice the products of flash.cpp an instruction.
// With AMX the same by tiles (blocks_bf16.h).
// Shares of keys, and their gradients, are rounded to bfloat16 before they are multiplied (as FlashAttention-2 does).
#include "flash_bf16.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "blocks_bf16.h"
#include "room.h"

namespace bimos::flash {

#ifdef BIMOS_X86
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

const uint16_t* row_of(const Heads& heads, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const uint16_t*>(heads.data) + batch * heads.batch + head * heads.head + token * heads.token;
}

// Tokens [first, first + kBlock) of a head, rows of `width` values; zeros where nothing is.
void read(const Heads& heads, int64_t batch, int64_t head, int64_t first, int64_t tokens, int64_t n, int64_t width, uint32_t* words) {
  auto* to = reinterpret_cast<uint16_t*>(words);
  for (int64_t i = 0; i < kBlock; ++i, to += width) {
    const int64_t count = first + i < tokens ? n : 0;
    if (count > 0) std::memcpy(to, row_of(heads, batch, head, first + i), static_cast<size_t>(count) * 2);
    std::memset(to + count, 0, static_cast<size_t>(width - count) * 2);
  }
}

// Low halves of words from the first, high halves from the second.
BIMOS_BF16 Words interleaved(Floats even, Floats odd) {
  const auto low = __builtin_convertvector(std::bit_cast<Halves>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(even))), Words);
  const auto high = __builtin_convertvector(std::bit_cast<Halves>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(odd))), Words);
  return low | high << 16;
}

BIMOS_BF16 void write(const float* from, int64_t rows, int64_t n, int64_t width, float factor, uint16_t* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += kWidth) store(load(from + i * width + j, kWidth) * factor, to + i * stride + j, std::min<int64_t>(kWidth, n - j));
}

// A block of queries over the blocks of keys up to its own.
struct Sums {
  float *sums, *scores;  // [kBlock, width], [kBlock, kBlock]
  uint32_t* shares;      // [kBlock, kPairs]
  float scale;
  float most[kBlock], total[kBlock];

  template <bool kMatrix>
  BIMOS_BF16 void add(const uint32_t* query, int64_t width, const uint32_t* keys, const uint32_t* values, int64_t own) {
    constexpr int64_t kStep = kMatrix ? 2 * amx::kRows : kRows;
    const int64_t words = width / 2;
    std::memset(sums, 0, static_cast<size_t>(kBlock * width) * 4);
    std::fill_n(most, kBlock, -kInfinity);
    std::fill_n(total, kBlock, 0.0F);
    for (int64_t k = 0; k <= own; ++k) {
      multiply<kMatrix, false>(kBlock, kBlock, [&](int64_t) BIMOS_ALWAYS { return words; }, query, words, keys + k * words * kBlock, kBlock, scores, kBlock);
      for (int64_t i = 0; i < kBlock; ++i) {
        if (k == own) std::fill(scores + i * kBlock + i + 1, scores + (i + 1) * kBlock, -kInfinity);
        weigh(i, width);
      }
      const auto seen = [&](int64_t i) BIMOS_ALWAYS { return k == own ? (i + kStep + 1) / 2 : kPairs; };
      multiply<kMatrix, true>(kBlock, width, seen, shares, kPairs, values + k * kPairs * width, width, sums, width);
    }
  }

  // Scores of row i to shares under the largest so far; earlier sums follow it.
  BIMOS_BF16 void weigh(int64_t i, int64_t width) {
    const float* row = scores + i * kBlock;
    Floats highest = load(row, kWidth), sum{};
    for (int64_t p = kWidth; p < kBlock; p += kWidth) highest = larger(load(row + p, kWidth), highest);
    const float before = most[i], now = std::max(before, largest_of(highest) * scale);
    for (int64_t p = 0; p < kBlock; p += 2 * kWidth) {
      const Floats low = exponential(load(row + p, kWidth) * scale - now), high = exponential(load(row + p + kWidth, kWidth) * scale - now);
      sum += low + high;
      _mm512_storeu_si512(shares + i * kPairs + p / 2, std::bit_cast<__m512i>(halves(low, high)));
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
};

template <bool kMatrix>
BIMOS_BF16 void forward_group(const Problem& problem, int64_t batch, int64_t group) {
  const int64_t tokens = problem.tokens, n = problem.n, width = up(n, 2 * kWidth), words = width / 2, blocks = up(tokens, kBlock) / kBlock;
  const int64_t shared = problem.heads / problem.key_heads;
  Room room(blocks * kBlock * (words + words) + kBlock * words + kBlock * (width + kBlock + kPairs) + 8 * kWidth);
  uint32_t *keys = room.words(blocks * words * kBlock), *values = room.words(blocks * kPairs * width), *query = room.words(kBlock * words);
  Sums result{room.floats(kBlock * width), room.floats(kBlock * kBlock), room.words(kBlock * kPairs), problem.scale, {}, {}};
  for (int64_t k = 0; k < blocks; ++k) {
    read(problem.key, batch, group, k * kBlock, tokens, n, width, query);
    turn(query, width, keys + k * words * kBlock);
    read(problem.value, batch, group, k * kBlock, tokens, n, width, query);
    pair_up(query, width, values + k * kPairs * width);
  }
  for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
    for (int64_t q = 0; q < blocks; ++q) {
      const int64_t first = q * kBlock, rows = std::min(kBlock, tokens - first);
      read(problem.query, batch, head, first, tokens, n, width, query);
      result.template add<kMatrix>(query, width, keys, values, q);
      float* lse = problem.lse + (batch * problem.heads + head) * tokens + first;
      auto* out = const_cast<uint16_t*>(row_of(problem.out, batch, head, first));
      for (int64_t i = 0; i < rows; ++i) {
        lse[i] = result.most[i] + std::log(result.total[i]);
        write(result.sums + i * width, 1, n, width, 1.0F / result.total[i], out + i * problem.out.token, n);
      }
    }
  }
}

// What a block of queries has in the backward pass.
struct Queries {
  uint32_t *turned, *paired, *grad_turned, *grad_paired;
  float lse[kBlock], delta[kBlock];

  BIMOS_BF16 void read_all(const Problem& problem, int64_t batch, int64_t head, int64_t first, int64_t width, uint32_t* rows, uint32_t* spare) {
    const int64_t tokens = problem.tokens, n = problem.n, words = width / 2;
    read(problem.query, batch, head, first, tokens, n, width, rows);
    turn(rows, width, turned);
    pair_up(rows, width, paired);
    read(problem.grad, batch, head, first, tokens, n, width, rows);
    turn(rows, width, grad_turned);
    pair_up(rows, width, grad_paired);
    read(problem.out, batch, head, first, tokens, n, width, spare);
    const float* known = problem.lse + (batch * problem.heads + head) * tokens + first;
    for (int64_t i = 0; i < kBlock; ++i) {  // rows that are not there have no share in anything
      lse[i] = first + i < tokens ? known[i] : kInfinity;
      Floats sum{};
      const auto *mine = reinterpret_cast<const uint16_t*>(rows + i * words), *out = reinterpret_cast<const uint16_t*>(spare + i * words);
      for (int64_t j = 0; j < width; j += kWidth) sum += load(mine + j, kWidth) * load(out + j, kWidth);
      delta[i] = sum_of(sum);
    }
  }
};

// Shares of a block of keys (rows) in a block of queries, and what their gradients are, from products of both.
struct Slopes {
  float *scores, *grads;           // [kBlock keys, kBlock queries]
  uint32_t *shares, *slopes;       // [kBlock keys, kPairs of queries]
  uint32_t* turned;                // [kPairs of keys, kBlock queries]: slopes once more

  BIMOS_BF16 void make(const Queries& queries, float scale, bool own) {
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      for (int64_t p = 0; p < kBlock; p += 2 * kWidth) {
        Floats share[2][2], slope[2][2];  // of key, vector
        for (int r = 0; r < 2; ++r) {
          const int64_t key = 2 * pair + r;
          for (int v = 0; v < 2; ++v) {
            const int64_t at = p + v * kWidth;
            const Floats score = load(scores + key * kBlock + at, kWidth) * scale - load(queries.lse + at, kWidth);
            share[r][v] = exponential(score);
            if (own && key > at) {  // queries before the key
              const auto before = static_cast<__mmask16>((1U << std::min<int64_t>(kWidth, key - at)) - 1);
              share[r][v] = std::bit_cast<Floats>(_mm512_mask_mov_ps(std::bit_cast<__m512>(share[r][v]), before, _mm512_setzero_ps()));
            }
            slope[r][v] = share[r][v] * (load(grads + key * kBlock + at, kWidth) - load(queries.delta + at, kWidth));
          }
          _mm512_storeu_si512(shares + key * kPairs + p / 2, std::bit_cast<__m512i>(halves(share[r][0], share[r][1])));
          _mm512_storeu_si512(slopes + key * kPairs + p / 2, std::bit_cast<__m512i>(halves(slope[r][0], slope[r][1])));
        }
        for (int v = 0; v < 2; ++v) {
          const Words both = interleaved(slope[0][v], slope[1][v]);
          std::memcpy(turned + pair * kBlock + p + v * kWidth, &both, sizeof both);
        }
      }
    }
  }
};

template <bool kMatrix>
BIMOS_BF16 void backward_group(const Problem& problem, int64_t batch, int64_t group) {
  const int64_t tokens = problem.tokens, n = problem.n, width = up(n, 2 * kWidth), words = width / 2, blocks = up(tokens, kBlock) / kBlock;
  const int64_t shared = problem.heads / problem.key_heads, block = kBlock * words;
  Room room(blocks * block * 3 + blocks * kBlock * width * 2 + 6 * block + kBlock * (2 * width + 2 * kBlock + 3 * kPairs) + 24 * kWidth);
  uint32_t *keys = room.words(blocks * block), *values = room.words(blocks * block), *keys_across = room.words(blocks * block);
  float *of_keys = room.floats(blocks * kBlock * width), *of_values = room.floats(blocks * kBlock * width);
  float *across = room.floats(kBlock * width), *of_query = room.floats(kBlock * width);
  uint32_t *rows = room.words(block), *spare = room.words(block);
  Queries queries{room.words(block), room.words(block), room.words(block), room.words(block), {}, {}};
  Slopes made{room.floats(kBlock * kBlock), room.floats(kBlock * kBlock), room.words(kBlock * kPairs), room.words(kBlock * kPairs), room.words(kPairs * kBlock)};
  for (int64_t k = 0; k < blocks; ++k) {
    read(problem.value, batch, group, k * kBlock, tokens, n, width, values + k * block);
    read(problem.key, batch, group, k * kBlock, tokens, n, width, keys + k * block);
    pair_up(keys + k * block, width, spare);
    for (int64_t j = 0; j < width; ++j)
      for (int64_t p = 0; p < kPairs; ++p) keys_across[k * block + j * kPairs + p] = spare[p * width + j];
  }
  std::memset(of_keys, 0, static_cast<size_t>(blocks * kBlock * width) * 4);
  std::memset(of_values, 0, static_cast<size_t>(blocks * kBlock * width) * 4);
  const auto all_words = [&](int64_t) BIMOS_ALWAYS { return words; };
  const auto all_pairs = [&](int64_t) BIMOS_ALWAYS { return kPairs; };
  for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
    const int64_t place = (batch * problem.heads + head) * tokens;
    for (int64_t q = 0; q < blocks; ++q) {
      const int64_t first = q * kBlock;
      queries.read_all(problem, batch, head, first, width, rows, spare);
      std::memset(across, 0, static_cast<size_t>(kBlock * width) * 4);
      for (int64_t k = 0; k <= q; ++k) {
        multiply<kMatrix, false>(kBlock, kBlock, all_words, keys + k * block, words, queries.turned, kBlock, made.scores, kBlock);
        multiply<kMatrix, false>(kBlock, kBlock, all_words, values + k * block, words, queries.grad_turned, kBlock, made.grads, kBlock);
        made.make(queries, problem.scale, k == q);
        multiply<kMatrix, true>(kBlock, width, all_pairs, made.shares, kPairs, queries.grad_paired, width, of_values + k * kBlock * width, width);
        multiply<kMatrix, true>(kBlock, width, all_pairs, made.slopes, kPairs, queries.paired, width, of_keys + k * kBlock * width, width);
        multiply<kMatrix, true>(width, kBlock, all_pairs, keys_across + k * block, kPairs, made.turned, kBlock, across, kBlock);
      }
      for (int64_t i = 0; i < kBlock; ++i)
        for (int64_t j = 0; j < width; ++j) of_query[i * width + j] = across[j * kBlock + i];
      write(of_query, std::min(kBlock, tokens - first), n, width, problem.scale, static_cast<uint16_t*>(problem.of_query) + (place + first) * n, n);
    }
  }
  const int64_t place = (batch * problem.key_heads + group) * tokens * n;
  write(of_keys, tokens, n, width, problem.scale, static_cast<uint16_t*>(problem.of_key) + place, n);
  write(of_values, tokens, n, width, 1.0F, static_cast<uint16_t*>(problem.of_value) + place, n);
}

BIMOS_TARGET void forward(const Problem& problem, int64_t batch, int64_t group) { forward_group<false>(problem, batch, group); }
BIMOS_TARGET void backward(const Problem& problem, int64_t batch, int64_t group) { backward_group<false>(problem, batch, group); }

BIMOS_TARGET void forward_by_matrices(const Problem& problem, int64_t batch, int64_t group) {
  const amx::Tiles tiles;
  forward_group<true>(problem, batch, group);
}

BIMOS_TARGET void backward_by_matrices(const Problem& problem, int64_t batch, int64_t group) {
  const amx::Tiles tiles;
  backward_group<true>(problem, batch, group);
}

}  // namespace
#endif

Functions training_for(const char* level, bool is_float) {
#ifdef BIMOS_X86
  if (!is_float && std::strcmp(level, "amx") == 0) return {forward_by_matrices, backward_by_matrices};
  if (!is_float && is_avx512(level) && __builtin_cpu_supports("avx512bf16")) return {forward, backward};
#endif
  return functions_for(level, is_float);
}

}  // namespace bimos::flash
