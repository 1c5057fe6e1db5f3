// Compiled without contraction to fused multiply-adds: bits are those that bimos/methods/lattice.py gives, to the last one.
#include "dual.h"

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace bimos::dual {
namespace {

// Comparisons are used where they are made: as an argument, GCC 12 takes them apart lane by lane.
BIMOS_INLINE Floats at_least(Floats value, Floats least) { return value >= least ? spread(1) : Floats{}; }  // 1 or 0; 0 of NaN

struct Group {
  float first, second, middle, half, step;  // step 1 where latents are weights
};

struct Bits {
  Floats one, two;  // 0 or 1
};

BIMOS_INLINE Bits bits_of(const Group& group, Floats weight) {
  const Floats one = at_least((weight - group.middle) * group.first, Floats{});
  return {one, at_least((weight - one * group.first - group.half) * group.second, Floats{})};
}

// `run(group, its number, start, end)` for every group of inputs of a row.
template <typename Run>
BIMOS_INLINE void groups(const Weights& weights, int64_t row, Run run) {
  const int64_t count = weights.groups();
  for (int64_t g = 0; g < count; ++g) {
    const float first = weights.scale[row * count + g], second = weights.scale[(weights.out + row) * count + g];
    const float step = std::fabs(first - second) / 3;
    const Group group{first, second, (first + second) / 2, second / 2, !weights.in_steps ? 1.0F : step < 1e-12F ? 1e-12F : step};
    run(group, g, g * weights.group, std::min(weights.in, (g + 1) * weights.group));
  }
}

template <typename T>
BIMOS_INLINE void forward_of(const Weights& weights, int64_t row) {
  const float* latent = weights.latent + row * weights.in;
  T* out = static_cast<T*>(weights.weight) + row * weights.in;
  groups(weights, row, [&](const Group& group, int64_t, int64_t start, int64_t end) BIMOS_ALWAYS {
    vectors(end - start, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
      const Bits bits = bits_of(group, load(latent + start + j, count) * group.step);
      store(bits.one * group.first + bits.two * group.second, out + start + j, count);
    });
  });
}

template <typename T>
BIMOS_INLINE void backward_of(const Weights& weights, int64_t row) {
  const float* latent = weights.latent + row * weights.in;
  const T* grad = static_cast<const T*>(weights.grad) + row * weights.in;
  float* of_latent = weights.of_latent + row * weights.in;
  const int64_t count_of_groups = weights.groups();
  groups(weights, row, [&](const Group& group, int64_t g, int64_t start, int64_t end) BIMOS_ALWAYS {
    const float lowest = (group.first > 0 ? 0 : group.first) + (group.second > 0 ? 0 : group.second);  // NaN stays NaN
    const float highest = (group.first < 0 ? 0 : group.first) + (group.second < 0 ? 0 : group.second);
    Floats of_first{}, of_second{};
    vectors(end - start, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
      const Floats weight = load(latent + start + j, count) * group.step, given = load(grad + start + j, count);
      const Bits bits = bits_of(group, weight);
      of_first += given * bits.one;
      of_second += given * bits.two;
      store(given * at_least(weight, spread(lowest)) * at_least(spread(highest), weight) * group.step, of_latent + start + j, count);
    });
    weights.of_scale[row * count_of_groups + g] = sum_of(of_first);
    weights.of_scale[(weights.out + row) * count_of_groups + g] = sum_of(of_second);
  });
}

BIMOS_INLINE void forward(const Weights& weights, int64_t first, int64_t last) {
  for (; first < last; ++first) weights.is_float ? forward_of<float>(weights, first) : forward_of<uint16_t>(weights, first);
}

BIMOS_INLINE void backward(const Weights& weights, int64_t first, int64_t last) {
  for (; first < last; ++first) weights.is_float ? backward_of<float>(weights, first) : backward_of<uint16_t>(weights, first);
}

}  // namespace

Functions BIMOS_HERE::functions() { return {of_width<kWidth, forward>(), of_width<kWidth, backward>()}; }

}  // namespace bimos::dual
