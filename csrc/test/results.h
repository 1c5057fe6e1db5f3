// Results of a kernel at a level against those at the plain one.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <random>
#include <vector>

using Floats = std::vector<float>;

inline Floats random_floats(int64_t count, unsigned seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats values(static_cast<size_t>(count));
  for (auto& value : values) value = scale * normal(random);
  return values;
}

// What a kernel writes, one after the other, for a level by its name.
using Results = std::function<Floats(const char*)>;

inline double difference(const Results& results, const char* level) {
  const Floats plain = results("scalar"), other = results(level);
  double off = 0, size = 0;
  for (size_t i = 0; i < plain.size(); ++i) {
    if (!std::isfinite(plain[i]) || !std::isfinite(other[i])) return 1;
    off += (other[i] - plain[i]) * (other[i] - plain[i]);
    size += plain[i] * plain[i];
  }
  return size > 0 ? std::sqrt(off / size) : 1;
}

inline Floats joined(std::initializer_list<const Floats*> parts) {
  Floats all;
  for (const Floats* part : parts) all.insert(all.end(), part->begin(), part->end());
  return all;
}
