// What a model does besides its linears, on rows of float32.
#pragma once

#include <cstdint>

#include "../targets.h"
#include "cache.h"

namespace bimos::maths {

constexpr int kHeads = 4;  // query heads at a time

struct Attention {
  const float* query;  // `heads` <= kHeads heads of n values, `stride` from one to the next; the output lies likewise
  float* out;
  int heads;
  int64_t stride, n;
  Cache keys, values;
  int64_t first, last;  // positions that are seen
  float scale;          // of the scores
  float* scores;        // room for heads * (last - first + n)
};

struct Maths {
  void (*rms_norm)(const float*, const float*, int64_t, float, float*);
  void (*rotate)(float*, const float*, const float*, int64_t);
  void (*swiglu)(float*, const float*, int64_t);
  void (*attend)(const Attention&);
  void (*remember)(const float*, int64_t, int64_t, const Cache&);
  void (*add)(const float*, int64_t, float*);
  float (*dot)(const float*, const float*, int64_t);
  void (*multiply)(const float*, int64_t, float*);
};

// Those for a level of level.h, by its name.
BIMOS_EVERY_WIDTH(Maths maths())
inline Maths maths_for(const char* level) { return BIMOS_FOR_LEVEL(level, maths)(); }

}  // namespace bimos::maths
