#include <algorithm>
#include <cstdint>
#include <vector>

#include "../engine/maths.h"
#include "../flash_bf16.h"
#include "results.h"
#include "training.h"

namespace {

namespace maths = bimos::maths;

// Room for the keys or values of one head, as bfloat16 or as int8 with scales.
class Remembered {
 public:
  Remembered(int64_t positions, int64_t n, bool is_int8)
      : halves_(static_cast<size_t>(positions * n)), bytes_(halves_.size()), scale_(static_cast<size_t>(positions)), is_int8_(is_int8) {}

  maths::Cache cache() { return {is_int8_ ? nullptr : halves_.data(), bytes_.data(), scale_.data()}; }

  Floats values() const {
    Floats all(halves_.begin(), halves_.end());
    all.insert(all.end(), bytes_.begin(), bytes_.end());
    all.insert(all.end(), scale_.begin(), scale_.end());
    return all;
  }

 private:
  std::vector<uint16_t> halves_;
  std::vector<int8_t> bytes_;
  Floats scale_;
  bool is_int8_;
};

Remembered remembered(const char* level, const Floats& values, int64_t n, bool is_int8) {
  const int64_t positions = static_cast<int64_t>(values.size()) / n;
  Remembered head(positions, n, is_int8);
  for (int64_t p = 0; p < positions; ++p) maths::maths_for(level).remember(values.data() + p * n, n, p, head.cache());
  return head;
}

Results rows(int64_t n) {
  return [n](const char* level) {
    const maths::Maths all = maths::maths_for(level);
    const Floats x = random_floats(n, 1), other = random_floats(n, 2), half = random_floats(n, 3);
    Floats normed(x.size()), rotated = x, gated = random_floats(n, 4, 3), sum = x, product = x;
    all.rms_norm(x.data(), other.data(), n, 1e-5F, normed.data());
    all.rotate(rotated.data(), half.data(), other.data(), n);
    all.swiglu(gated.data(), other.data(), n);
    all.add(other.data(), n, sum.data());
    all.multiply(other.data(), n, product.data());
    const Floats dot{all.dot(x.data(), other.data(), n)};
    return joined({&normed, &rotated, &gated, &sum, &product, &dot});
  };
}

Results memories(int64_t n, bool is_int8) {
  return [=](const char* level) { return remembered(level, random_floats(3 * n, 5), n, is_int8).values(); };
}

Results attention(int heads, int64_t positions, int64_t n, bool is_int8) {
  return [=](const char* level) {
    Remembered keys = remembered("scalar", random_floats(positions * n, 1), n, is_int8);
    Remembered values = remembered("scalar", random_floats(positions * n, 2), n, is_int8);
    const Floats query = random_floats(heads * n, 3);
    Floats out(query.size()), scores(static_cast<size_t>(heads * (positions + n)));
    const int64_t first = positions / 3;  // the start of a window
    maths::maths_for(level).attend({query.data(), out.data(), heads, n, n, keys.cache(), values.cache(), first, positions, 0.2F, scores.data()});
    return out;
  };
}

Results prompt(int64_t tokens, int64_t past, int64_t n, int64_t window, bool is_int8) {
  return [=](const char* level) {
    constexpr int64_t heads = 3;
    Remembered keys = remembered("scalar", random_floats((past + tokens) * n, 1), n, is_int8);
    Remembered values = remembered("scalar", random_floats((past + tokens) * n, 2), n, is_int8);
    const Floats query = random_floats(tokens * heads * n, 3);
    Floats out(query.size());
    std::vector<int64_t> blocks(static_cast<size_t>((tokens + bimos::flash::kBlock - 1) / bimos::flash::kBlock));
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int64_t>(i);
    bimos::flash::reading_for(level)({query.data(), out.data(), heads * n, heads, tokens, n, past, window, 0.2F, keys.cache(), values.cache()},
                                    blocks.data(), static_cast<int64_t>(blocks.size()));
    return out;
  };
}

}  // namespace

double engine_difference(const char* level) {
  double worst = 0;
  const auto see = [&](const Results& results) { worst = std::max(worst, difference(results, level)); };
  for (const int64_t n : {2, 34, 64, 130}) see(rows(n));
  for (const bool is_int8 : {false, true}) {
    for (const int64_t n : {1, 17, 64}) see(memories(n, is_int8));
    for (const int heads : {1, 2, 3, 4}) {
      for (const int64_t positions : {1, 5, 33, 100}) {
        for (const int64_t n : {8, 20, 64, 128}) see(attention(heads, positions, n, is_int8));
      }
    }
    for (const int64_t tokens : {1, 65, 130}) {
      for (const int64_t past : {0, 37}) {
        see(prompt(tokens, past, 64, bimos::flash::kEndless, is_int8));
        see(prompt(tokens, past, 40, 50, is_int8));
      }
    }
  }
  return worst;
}
