// A plain read of a buffer by all threads, as fast as memory gives it: what the bandwidth of other work is set against.
#include <atomic>
#include <cstdint>
#include <cstring>

#include "tensors.h"

namespace bimos {
namespace {

typedef uint64_t Words2 __attribute__((vector_size(16)));
typedef uint64_t Words4 __attribute__((vector_size(32)));
typedef uint64_t Words8 __attribute__((vector_size(64)));

// Sum of the words, so that none can be left unread, eight vectors side by side. Inlined into functions of a target each.
template <typename Vector>
[[gnu::always_inline]] inline uint64_t sum_by(const uint64_t* words, int64_t count) {
  constexpr int64_t kWords = sizeof(Vector) / sizeof(uint64_t), kStep = 8 * kWords;
  Vector sums[8] = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    for (int64_t j = 0; j < 8; ++j) {
      Vector part;  // an alignment of its own would not outlast the template
      std::memcpy(&part, words + i + j * kWords, sizeof part);
      sums[j] += part;
    }
  for (int64_t j = 1; j < 8; ++j) sums[0] += sums[j];
  uint64_t total = 0;
  for (int64_t j = 0; j < kWords; ++j) total += sums[0][j];
  for (; i < count; ++i) total += words[i];
  return total;
}

uint64_t sum_plain(const uint64_t* words, int64_t count) { return sum_by<Words2>(words, count); }
#ifdef BIMOS_X86
__attribute__((target("avx2"))) uint64_t sum_avx2(const uint64_t* words, int64_t count) { return sum_by<Words4>(words, count); }
__attribute__((target("avx512f"))) uint64_t sum_avx512(const uint64_t* words, int64_t count) { return sum_by<Words8>(words, count); }
#endif

// By what the processor has, whatever level the kernels were told to keep to: the machine's bandwidth is not theirs.
auto widest_sum() {
#ifdef BIMOS_X86
  if (__builtin_cpu_supports("avx512f")) return sum_avx512;
  if (__builtin_cpu_supports("avx2")) return sum_avx2;
#endif
  return sum_plain;
}

// Reads all of an int64 buffer `passes` times; a thread keeps to its own part, so that threads need not wait for each other between passes.
int64_t read_memory(const Tensor& buffer, int64_t passes) {
  STD_TORCH_CHECK(buffer.scalar_type() == ScalarType::Long && buffer.is_contiguous(), "read_memory takes a contiguous int64 tensor");
  STD_TORCH_CHECK(passes >= 1, "read_memory: ", passes, " passes");
  const auto* words = static_cast<const uint64_t*>(buffer.const_data_ptr());
  const int64_t count = buffer.numel(), threads = torch::stable::get_num_threads();
  const auto sum = widest_sum();
  std::atomic<uint64_t> total{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = count * begin / threads, last = count * end / threads;
    uint64_t mine = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
      mine += sum(words + first, last - first);
      asm volatile("" ::: "memory");  // the next pass reads again
    }
    total += mine;
  });
  return static_cast<int64_t>(total.load());
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_FRAGMENT(bimos, library) { library.def("read_memory(Tensor buffer, int passes) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(bimos, CPU, library) { library.impl("read_memory", TORCH_BOX(&bimos::read_memory)); }
