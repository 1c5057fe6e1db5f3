#include "integers.h"

#include "targets.h"
#include "vectors.h"

namespace bimos::integers {
namespace {

constexpr float kMost = 127;
constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23: the last bits of a sum with it are the nearest whole number

BIMOS_INLINE Floats size_of(Floats x) { return std::bit_cast<Floats>(std::bit_cast<Words>(x) & 0x7fffffffU); }

template <typename T>
BIMOS_INLINE void round_some(const Rows& rows, int64_t first, int64_t last) {
  using Ints = int32_t __attribute__((vector_size(4 * kWidth)));
  for (int64_t i = first; i < last; ++i) {
    const T* x = static_cast<const T*>(rows.x) + i * rows.n;
    int8_t* out = rows.out + i * rows.n;
    Floats largest{};
    vectors(rows.n, [&](int64_t j, int64_t count) BIMOS_ALWAYS { largest = larger(size_of(load(x + j, count)), largest); });
    const float most = largest_of(largest), factor = most > 0 ? kMost / most : 0.0F;
    rows.scale[i] = most / kMost;
    vectors(rows.n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
      const auto whole = std::bit_cast<Ints>(load(x + j, count) * factor + kRounder);
      const Chars bytes = __builtin_convertvector(whole, Chars);
      copy(&bytes, out + j, count);
    });
  }
}

template <typename T>
BIMOS_INLINE void scale_some(const Sums& sums, int64_t first, int64_t last) {
  using Ints = int32_t __attribute__((vector_size(4 * kWidth)));
  for (int64_t i = first; i < last; ++i) {
    const int32_t* from = sums.sums + i * sums.n;
    T* out = static_cast<T*>(sums.out) + i * sums.n;
    const float row = sums.row[i];
    vectors(sums.n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
      Ints whole{};
      copy(from + j, &whole, count);
      Floats value = __builtin_convertvector(whole, Floats) * row * load(sums.column + j, count);
      if (sums.bias != nullptr) value += load(sums.bias + j, count);
      store(value, out + j, count);
    });
  }
}

}  // namespace

Functions functions_for(const char* level, bool is_float) {
  if (is_float) return {pick<round_some<float>>(level), pick<scale_some<float>>(level)};
  return {pick<round_some<uint16_t>>(level), pick<scale_some<uint16_t>>(level)};
}

}  // namespace bimos::integers
