// The next token from logits.
#pragma once

#include <cstdint>
#include <vector>

namespace bimos {

struct Sampling {
  float temperature = 0;  // 0: the likeliest token
  int64_t top_k = 0;      // 0: all
  float top_p = 1;        // the likeliest that together have this much
  float min_p = 0;        // at least this much of the likeliest's
  float repetition_penalty = 1;
};

// Picks a token; -1 where logits are not finite. `logits [n]` are changed. `seen` are the tokens so far, for the penalty. `random` is from [0, 1).
int64_t pick(float* logits, int64_t n, const Sampling& sampling, const std::vector<int64_t>& seen, double random);

// A number from [0, 1) that depends on both.
double uniform(uint64_t seed, uint64_t position);

}  // namespace bimos
