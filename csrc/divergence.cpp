#include "divergence.h"

#include <cmath>

#include "room.h"
#include "vectors.h"

namespace bimos::divergence {
namespace {

// `powers` and those of the teacher are room for n values each: read again, they cost less than made again.
template <typename T>
BIMOS_INLINE void row_of(const Logits& logits, int64_t row, float* powers, float* powers_of_teacher) {
  const int64_t n = logits.n;
  const T *student = static_cast<const T*>(logits.student) + row * n, *teacher = static_cast<const T*>(logits.teacher) + row * n;
  T* slope = static_cast<T*>(logits.slope) + row * n;
  const float inverse = 1.0F / logits.temperature;
  float highest = load(student, 1)[0], highest_of_teacher = load(teacher, 1)[0];
  Floats most = spread(highest), most_of_teacher = spread(highest_of_teacher);
  vectors(n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    const Floats s = load(student + j, count), t = load(teacher + j, count);
    if (count < kWidth) {  // zeros behind the last value are none of them
      for (int64_t i = 0; i < count; ++i) {
        highest = s[i] > highest ? s[i] : highest;
        highest_of_teacher = t[i] > highest_of_teacher ? t[i] : highest_of_teacher;
      }
      return;
    }
    most = larger(s, most);
    most_of_teacher = larger(t, most_of_teacher);
  });
  highest = std::fmax(highest, largest_of(most));
  highest_of_teacher = std::fmax(highest_of_teacher, largest_of(most_of_teacher));
  Floats total{}, total_of_teacher{}, distance{};
  float total_tail = 0, teacher_tail = 0, distance_tail = 0;
  vectors(n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    const Floats s = (load(student + j, count) - highest) * inverse, t = (load(teacher + j, count) - highest_of_teacher) * inverse;
    const Floats e = exponential(s), p = exponential(t), d = p * (t - s);
    store(e, powers + j, count);
    store(p, powers_of_teacher + j, count);
    if (count < kWidth) {
      for (int64_t i = 0; i < count; ++i) total_tail += e[i], teacher_tail += p[i], distance_tail += d[i];
      return;
    }
    total += e;
    total_of_teacher += p;
    distance += d;
  });
  const float sum = sum_of(total) + total_tail, sum_of_teacher = sum_of(total_of_teacher) + teacher_tail;
  logits.value[row] = (sum_of(distance) + distance_tail) / sum_of_teacher + std::log(sum / sum_of_teacher);
  const float share = logits.factor / sum, share_of_teacher = logits.factor / sum_of_teacher;
  vectors(n, [&](int64_t j, int64_t count) BIMOS_ALWAYS {
    store(load(powers + j, count) * share - load(powers_of_teacher + j, count) * share_of_teacher, slope + j, count);
  });
}

template <typename T>
BIMOS_INLINE void rows_of(const Logits& logits, int64_t first, int64_t last) {
  Room room(2 * up(logits.n, Room::kLine));
  float *powers = room.floats(logits.n), *powers_of_teacher = room.floats(logits.n);
  for (; first < last; ++first) row_of<T>(logits, first, powers, powers_of_teacher);
}

BIMOS_INLINE void rows(const Logits& logits, int64_t first, int64_t last) {
  logits.is_float ? rows_of<float>(logits, first, last) : rows_of<uint16_t>(logits, first, last);
}

}  // namespace

Function BIMOS_HERE::function() { return of_width<kWidth, rows>(); }

}  // namespace bimos::divergence
