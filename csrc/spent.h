// Where the time of a step goes: counted in the thread that asks for it, at the cost of a comparison in all others.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>

namespace bimos {

enum class Part : size_t { products, tables, scales, router, attention, head, rest, waiting };

struct Spent {
  static constexpr size_t kParts = 8;
  using Clock = std::chrono::steady_clock;

  std::array<double, kParts> seconds{};
  Clock::time_point last = Clock::now();

  void mark(Part part) {
    const Clock::time_point now = Clock::now();
    seconds[static_cast<size_t>(part)] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

// The counter of this thread, or null.
inline Spent*& spent() {
  static thread_local Spent* mine = nullptr;
  return mine;
}

// Counts in this thread while it lives, where `into` is not null.
struct Counting {
  explicit Counting(Spent* into) {
    spent() = into;
    if (into != nullptr) into->last = Spent::Clock::now();
  }
  ~Counting() { spent() = nullptr; }
  Counting(const Counting&) = delete;
  Counting& operator=(const Counting&) = delete;
};

// What this thread did since the last mark was `part`.
inline void mark(Part part) {
  if (Spent* mine = spent()) mine->mark(part);
}

}  // namespace bimos
