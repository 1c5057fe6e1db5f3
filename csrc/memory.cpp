#include "memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <new>

namespace bimos {
namespace {

constexpr size_t kPage = size_t{1} << 21;
constexpr size_t kChunk = 8 * kPage;  // of which what is never written to costs nothing

size_t up_to(size_t bytes, size_t unit) {
  if (bytes > SIZE_MAX - unit) throw std::bad_alloc();
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  const auto from = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (from + kPage - 1) / kPage * kPage, end = (from + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

uint8_t* Arena::take(size_t bytes) {
  bytes = up_to(bytes, 64);
  if (bytes > left_) {
    const size_t size = up_to(std::max(bytes, kChunk), kPage);
    Memory memory(std::aligned_alloc(kPage, size), &std::free);
    if (memory == nullptr) throw std::bad_alloc();
    ask_for_large_pages(memory.get(), size);
    chunks_.push_back(std::move(memory));
    if (bytes == size) return static_cast<uint8_t*>(chunks_.back().get());  // the chunk before may have room yet
    next_ = static_cast<uint8_t*>(chunks_.back().get());
    left_ = size;
  }
  uint8_t* taken = next_;
  next_ += bytes;
  left_ -= bytes;
  return taken;
}

}  // namespace bimos
