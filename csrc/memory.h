// Memory in large pages where the system has them: weights are read whole for every token, and small pages would be looked up each time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace bimos {

// Asks the system to back memory that was not written to yet with large pages; nothing happens where it cannot.
void ask_for_large_pages(void* data, size_t bytes);

class Arena {
 public:
  // Memory for so many bytes at a multiple of 64, the arena's own; throws std::bad_alloc.
  uint8_t* take(size_t bytes);

 private:
  using Memory = std::unique_ptr<void, decltype(&std::free)>;

  std::vector<Memory> chunks_;
  uint8_t* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace bimos
