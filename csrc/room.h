// Memory for one call of a kernel, kept from call to call by its thread; calls do not nest.
#pragma once

#include <cstdint>
#include <vector>

namespace bimos {

inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

class Room {
 public:
  static constexpr int64_t kLine = 16;  // words of a line of the cache

  // For `count` floats or words in all, each part rounded up to a line of the cache.
  explicit Room(int64_t count) {
    thread_local std::vector<uint32_t> kept;
    if (static_cast<int64_t>(kept.size()) < count + kLine) kept.resize(static_cast<size_t>(count + kLine));
    next_ = kept.data() + (64 - reinterpret_cast<uintptr_t>(kept.data()) % 64) % 64 / 4;
  }

  uint32_t* words(int64_t count) {
    uint32_t* mine = next_;
    next_ += up(count, kLine);
    return mine;
  }

  float* floats(int64_t count) { return reinterpret_cast<float*>(words(count)); }

 private:
  uint32_t* next_;
};

}  // namespace bimos
