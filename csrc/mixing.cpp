#include "mixing.h"

#include <algorithm>
#include <cstring>

#include "vectors.h"

namespace bimos::mixing {
namespace {

constexpr int kRows = kWidth == 16 ? 4 : 2;  // tokens at a time: experts are loaded once for all of them, and sums stay in registers

// Of every token's logits, in place.
template <int kExperts, int kTokens>
BIMOS_INLINE void softmax(float (*logits)[kExperts]) {
  for (int t = 0; t < kTokens; ++t) {
    float most = logits[t][0];
    for (int e = 1; e < kExperts; ++e) most = logits[t][e] > most ? logits[t][e] : most;
    for (int e = 0; e < kExperts; ++e) logits[t][e] -= most;
  }
  vectors(kTokens * kExperts, [&](int64_t i, int64_t count) BIMOS_ALWAYS { store(exponential(load(logits[0] + i, count)), logits[0] + i, count); });
  for (int t = 0; t < kTokens; ++t) {
    float sum = 0;
    for (int e = 0; e < kExperts; ++e) sum += logits[t][e];
    for (int e = 0; e < kExperts; ++e) logits[t][e] /= sum;
  }
}

// sum over j of values[t][j] rows[e][j], for several tokens; `values(t, j, count)` gives a token's vector.
template <int kExperts, int kTokens, typename Values>
BIMOS_INLINE void dots(int64_t n, const float* rows, float (*out)[kExperts], Values values) {
  constexpr int kSums = kTokens * kExperts, kPadded = (kSums + kWidth - 1) / kWidth * kWidth;
  Floats sums[kPadded] = {};
  vectors(n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    Floats row[kExperts];
    for (int e = 0; e < kExperts; ++e) row[e] = load(rows + e * n + j, count);
    for (int t = 0; t < kTokens; ++t) {
      const Floats value = values(t, j, count);
      for (int e = 0; e < kExperts; ++e) sums[t * kExperts + e] += value * row[e];
    }
  });
  for (int i = 0; i < kSums; i += kWidth) store(sums_of(sums + i), out[0] + i, std::min(kWidth, kSums - i));
}

template <int kExperts, int kTokens, typename T>
BIMOS_INLINE void forward_of(const Batch& batch, int64_t token) {
  const int64_t n = batch.n;
  const T* x = static_cast<const T*>(batch.x) + token * n;
  T* out = static_cast<T*>(batch.out) + token * n;
  float gates[kTokens][kExperts];
  for (int t = 0; t < kTokens; ++t)
    for (int e = 0; e < kExperts; ++e) gates[t][e] = batch.gate == nullptr ? 1.0F : batch.gate[(token + t) * kExperts + e];
  if (batch.router != nullptr) {
    dots<kExperts, kTokens>(n, batch.router, gates, [&](int t, int64_t j, int64_t count) BIMOS_ALWAYS { return load(x + t * n + j, count); });
    softmax<kExperts, kTokens>(gates);
    std::memcpy(batch.gate + token * kExperts, gates, sizeof gates);
  }
  vectors(n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    Floats scale[kExperts];
    for (int e = 0; e < kExperts; ++e) scale[e] = load(batch.scales + e * n + j, count);
    for (int t = 0; t < kTokens; ++t) {
      Floats mixed = spread(gates[t][0]) * scale[0];
      for (int e = 1; e < kExperts; ++e) mixed += spread(gates[t][e]) * scale[e];
      store(load(x + t * n + j, count) * mixed, out + t * n + j, count);
    }
  });
}

template <int kExperts, int kTokens, typename T>
BIMOS_INLINE void backward_of(const Batch& batch, int64_t token) {
  const int64_t n = batch.n;
  const T *x = static_cast<const T*>(batch.x) + token * n, *grad = static_cast<const T*>(batch.grad) + token * n;
  T* out = static_cast<T*>(batch.out) + token * n;
  float gates[kTokens][kExperts], of_gate[kTokens][kExperts], of_logit[kTokens][kExperts] = {};
  for (int t = 0; t < kTokens; ++t)
    for (int e = 0; e < kExperts; ++e) gates[t][e] = batch.gate == nullptr ? 1.0F : batch.gate[(token + t) * kExperts + e];
  if (batch.gate != nullptr) {
    dots<kExperts, kTokens>(n, batch.scales, of_gate, [&](int t, int64_t j, int64_t count) BIMOS_ALWAYS {
      return load(x + t * n + j, count) * load(grad + t * n + j, count);
    });
    for (int t = 0; t < kTokens; ++t) {
      float* given = batch.grad_gate + (token + t) * kExperts;
      if (batch.router == nullptr) {
        for (int e = 0; e < kExperts; ++e) given[e] = of_gate[t][e];
        continue;
      }
      float mean = 0;
      for (int e = 0; e < kExperts; ++e) mean += gates[t][e] * (of_gate[t][e] += given[e]);
      for (int e = 0; e < kExperts; ++e) of_logit[t][e] = gates[t][e] * (of_gate[t][e] - mean);
    }
  }
  vectors(n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    Floats scale[kExperts], route[kExperts] = {}, of_scale[kExperts], of_route[kExperts] = {};
    for (int e = 0; e < kExperts; ++e) {
      scale[e] = load(batch.scales + e * n + j, count);
      of_scale[e] = load(batch.grad_scales + e * n + j, count);
      if (batch.router == nullptr) continue;
      route[e] = load(batch.router + e * n + j, count);
      of_route[e] = load(batch.grad_router + e * n + j, count);
    }
    for (int t = 0; t < kTokens; ++t) {
      const Floats value = load(x + t * n + j, count), given = load(grad + t * n + j, count), product = value * given;
      Floats mixed = spread(gates[t][0]) * scale[0];
      for (int e = 1; e < kExperts; ++e) mixed += spread(gates[t][e]) * scale[e];
      Floats result = given * mixed;
      for (int e = 0; e < kExperts; ++e) of_scale[e] += spread(gates[t][e]) * product;
      if (batch.router != nullptr) {
        for (int e = 0; e < kExperts; ++e) {
          result += spread(of_logit[t][e]) * route[e];
          of_route[e] += spread(of_logit[t][e]) * value;
        }
      }
      store(result, out + t * n + j, count);
    }
    for (int e = 0; e < kExperts; ++e) {
      store(of_scale[e], batch.grad_scales + e * n + j, count);
      if (batch.router != nullptr) store(of_route[e], batch.grad_router + e * n + j, count);
    }
  });
}

template <int kExperts, typename T>
BIMOS_INLINE void forward_rows(const Batch& batch, int64_t first, int64_t last) {
  for (; first + kRows <= last; first += kRows) forward_of<kExperts, kRows, T>(batch, first);
  for (; first < last; ++first) forward_of<kExperts, 1, T>(batch, first);
}

template <int kExperts, typename T>
BIMOS_INLINE void backward_rows(const Batch& batch, int64_t first, int64_t last) {
  for (; first + kRows <= last; first += kRows) backward_of<kExperts, kRows, T>(batch, first);
  for (; first < last; ++first) backward_of<kExperts, 1, T>(batch, first);
}

template <int kExperts>
BIMOS_INLINE void forward(const Batch& batch, int64_t first, int64_t last) {
  batch.is_float ? forward_rows<kExperts, float>(batch, first, last) : forward_rows<kExperts, uint16_t>(batch, first, last);
}

template <int kExperts>
BIMOS_INLINE void backward(const Batch& batch, int64_t first, int64_t last) {
  batch.is_float ? backward_rows<kExperts, float>(batch, first, last) : backward_rows<kExperts, uint16_t>(batch, first, last);
}

template <int kExperts>
Functions of() {
  return {of_width<kWidth, forward<kExperts>>(), of_width<kWidth, backward<kExperts>>()};
}

}  // namespace

Functions BIMOS_HERE::functions_for(int64_t experts) {
  switch (experts) {
    case 1: return of<1>();
    case 2: return of<2>();
    case 4: return of<4>();
    case 8: return of<8>();
    default: return {};
  }
}

}  // namespace bimos::mixing
