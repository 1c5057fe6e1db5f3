// Causal attention of grouped heads over many tokens, forward and backward for training and over a cache for prompts: blocks of 64
// queries by 64 keys with sums and products in float32, so that no matrix of scores exists (FlashAttention-2, 2307.08691).
#pragma once

#include <cstdint>

#include "engine/cache.h"
#include "targets.h"

namespace bimos::flash {

// [batch, head, token, n] with strides in values; the last is 1.
struct Heads {
  const void* data;
  int64_t batch, head, token;
};

struct Problem {
  int64_t heads, key_heads, tokens, n;
  float scale;  // of the scores
  Heads query, key, value;
  Heads out, grad;        // backward only; in forward `out` is written
  float* lse;             // [batch, heads, tokens]: log of the sum of exponentials of scores
  void *of_query, *of_key, *of_value;  // [batch, heads or key_heads, tokens, n], contiguous: gradients
};

// The heads that share key head `group` of a batch.
using Function = void (*)(const Problem& problem, int64_t batch, int64_t group);

// Queries at positions past, past + 1, .. of the heads that share one head of a cache, which holds their own keys and values already.
struct Prompt {
  const float* query;  // [tokens, heads, n], `stride` values from token to token
  float* out;          // likewise
  int64_t stride, heads, tokens, n, past;
  int64_t window;  // keys that a query sees, its own included
  float scale;     // of the scores
  maths::Cache keys, values;
};

constexpr int64_t kBlock = 64;            // queries, and keys
constexpr int64_t kEndless = 0x7fffffff;  // a window without an end

using PromptFunction = void (*)(const Prompt& prompt, const int64_t* blocks, int64_t count);  // of queries, in order

struct Functions {
  Function forward, backward;
};

// For a level of level.h by its name, and values that are float32, else bfloat16.
BIMOS_EVERY_WIDTH(Functions functions(bool is_float))
BIMOS_EVERY_WIDTH(PromptFunction prompt())
inline Functions functions_for(const char* level, bool is_float) { return BIMOS_FOR_LEVEL(level, functions)(is_float); }
inline PromptFunction prompt_for(const char* level) { return BIMOS_FOR_LEVEL(level, prompt)(); }

}  // namespace bimos::flash
