#include "sampler.h"

#include <algorithm>
#include <cmath>

namespace bimos {
namespace {

void penalize(float* logits, int64_t n, float penalty, const std::vector<int64_t>& seen) {
  thread_local std::vector<uint8_t> done;  // by token; all 0 between calls
  if (static_cast<int64_t>(done.size()) < n) done.resize(static_cast<size_t>(n));
  for (const int64_t id : seen) {
    if (id < 0 || id >= n || done[static_cast<size_t>(id)]) continue;
    done[static_cast<size_t>(id)] = 1;
    logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  }
  for (const int64_t id : seen)
    if (id >= 0 && id < n) done[static_cast<size_t>(id)] = 0;
}

constexpr int64_t kStretch = 1024;  // logits whose largest is known, so that most of them are looked at once

// The largest of every stretch; false where any is NaN.
bool largest_of_stretches(const float* logits, int64_t n, std::vector<float>& largest) {
  int strange = 0;
  largest.clear();
  for (int64_t start = 0; start < n; start += kStretch) {
    const int64_t end = std::min(n, start + kStretch);
    float most = logits[start];
#pragma omp simd reduction(max : most) reduction(| : strange)
    for (int64_t id = start; id < end; ++id) {
      most = logits[id] > most ? logits[id] : most;
      strange |= static_cast<int>(logits[id] != logits[id]);
    }
    largest.push_back(most);
  }
  return strange == 0;
}

}  // namespace

int64_t pick(float* logits, int64_t n, const Sampling& sampling, const std::vector<int64_t>& seen, double random) {
  if (sampling.repetition_penalty != 1) penalize(logits, n, sampling.repetition_penalty, seen);
  thread_local std::vector<float> largest;
  if (!largest_of_stretches(logits, n, largest)) return -1;
  const int64_t stretch = std::max_element(largest.begin(), largest.end()) - largest.begin();
  const float most = largest[static_cast<size_t>(stretch)];
  if (!std::isfinite(most)) return -1;
  if (sampling.temperature <= 0) return std::find(logits + stretch * kStretch, logits + n, most) - logits;

  // In the order of transformers: temperature, top-k, top-p, min-p. Below e^-40 of the likeliest nothing is ever drawn.
  struct Candidate {
    float logit;
    int64_t id;
  };
  std::vector<Candidate> candidates;
  const float least = most - sampling.temperature * 40;
  for (int64_t start = 0; start < n; start += kStretch) {
    if (largest[static_cast<size_t>(start / kStretch)] < least) continue;
    for (int64_t id = start; id < std::min(n, start + kStretch); ++id)
      if (logits[id] >= least) candidates.push_back({logits[id], id});
  }
  const auto likelier = [](const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); };
  if (sampling.top_k > 0 && static_cast<int64_t>(candidates.size()) > sampling.top_k) {
    std::nth_element(candidates.begin(), candidates.begin() + sampling.top_k, candidates.end(), likelier);
    candidates.resize(static_cast<size_t>(sampling.top_k));
  }
  std::sort(candidates.begin(), candidates.end(), likelier);
  std::vector<double> weights;  // times the likeliest one's
  double total = 0;
  for (const Candidate& candidate : candidates) {
    weights.push_back(std::exp(static_cast<double>(candidate.logit - most) / sampling.temperature));
    total += weights.back();
  }
  size_t kept = weights.size();
  if (sampling.top_p < 1) {
    double sum = 0;
    for (kept = 0; kept < weights.size() && (kept == 0 || sum < sampling.top_p * total); ++kept) sum += weights[kept];
  }
  while (kept > 1 && weights[kept - 1] < sampling.min_p) --kept;
  total = 0;
  for (size_t i = 0; i < kept; ++i) total += weights[i];
  double left = random * total;
  for (size_t i = 0; i < kept; ++i) {
    left -= weights[i];
    if (left < 0) return candidates[i].id;
  }
  return candidates[kept - 1].id;
}

double uniform(uint64_t seed, uint64_t position) {  // SplitMix64
  uint64_t z = seed * 0x9e3779b97f4a7c15ULL + position + 1;
  for (int round = 0; round < 2; ++round) {
    z += 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    z ^= z >> 31;
  }
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

}  // namespace bimos
