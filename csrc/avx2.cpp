// AVX2: tables of 16-bit sums, looked up by pshufb in two byte planes.
//
// Sums of four inputs are rounded to 16 bits, made unsigned, and split in a high and a low byte. pshufb looks 32 rows up at once;
// bytes are added up as pairs in 16-bit lanes (`all`), upper bytes alone beside them (`upper`), so that both come out at the end of a block.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "targets.h"
#include "tiles.h"

#define TARGET BIMOS_AVX2

namespace bimos {
namespace {

constexpr float kLargest = 32512;
constexpr int kOffset = 32768;
// Lookups whose unsigned bytes a 16-bit lane can hold the sum of; two a step.
constexpr int64_t kSafeSteps = 128;

TARGET void load(const void* from, Dtype dtype, int64_t n, float* to) {
  if (dtype == Dtype::float32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const auto* half = static_cast<const uint16_t*>(from);
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + j));
    const __m256 value =
        dtype == Dtype::float16 ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    _mm256_storeu_ps(to + j, value);
  }
  scalar_level().load(half + j, dtype, n - j, to + j);
}

TARGET void store(const float* from, Dtype dtype, int64_t n, void* to) {
  int64_t j = 0;
  if (dtype == Dtype::float16) {
    for (; j + 8 <= n; j += 8) {
      const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + j), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + j), bits);
    }
  }
  const size_t size = dtype == Dtype::float32 ? 4 : 2;
  scalar_level().store(from + j, dtype, n - j, static_cast<char*>(to) + static_cast<size_t>(j) * size);
}

TARGET inline __m256 load_half(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }

TARGET inline float sum_of(__m256 value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

TARGET void dots(const float* x, const uint16_t* rows, int64_t count, int64_t n, float* out) {
  for (int64_t r = 0; r < count; ++r) {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
      even = _mm256_fmadd_ps(_mm256_loadu_ps(x + j), load_half(rows + r * n + j), even);
      odd = _mm256_fmadd_ps(_mm256_loadu_ps(x + j + 8), load_half(rows + r * n + j + 8), odd);
    }
    for (; j + 8 <= n; j += 8) even = _mm256_fmadd_ps(_mm256_loadu_ps(x + j), load_half(rows + r * n + j), even);  // n is a multiple of 8
    out[r] = sum_of(_mm256_add_ps(even, odd));
  }
}

TARGET void mix(const float* x, const float* gate, const uint16_t* rows, int64_t count, int64_t stride, int64_t n, float* out) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    __m256 scale = _mm256_setzero_ps();
    for (int64_t e = 0; e < count; ++e) scale = _mm256_fmadd_ps(_mm256_set1_ps(gate[e]), load_half(rows + e * stride + j), scale);
    _mm256_storeu_ps(out + j, _mm256_mul_ps(scale, _mm256_loadu_ps(x + j)));
  }
  scalar_level().mix(x + j, gate, rows + j, count, stride, n - j, out + j);
}

// 16 high bytes and 16 low bytes for every 4 inputs.
size_t table_bytes(int64_t in) { return static_cast<size_t>(ceil_div(in, 32) * 32 / 4 * 32); }

TARGET void build(const float* x, const Plane& plane, uint8_t* tables, float* scales) {
  const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int64_t start = 0; start < plane.in; start += plane.block) {
    const int64_t end = std::min(plane.in, start + plane.block);
    __m256 most = _mm256_setzero_ps(), strange = _mm256_setzero_ps();
    for (int64_t j = start; j < end; j += 8) {
      __m256 value = _mm256_and_ps(absolute, _mm256_loadu_ps(x + j));
      strange = _mm256_add_ps(strange, _mm256_sub_ps(value, value));  // NaN where any input is not finite
      value = _mm256_add_ps(value, _mm256_permute_ps(value, 0xb1));
      most = _mm256_max_ps(most, _mm256_add_ps(value, _mm256_permute_ps(value, 0x4e)));
    }
    float largest[8];
    _mm256_storeu_ps(largest, most);
    const float bound = *std::max_element(largest, largest + 8) + sum_of(strange);
    // Sums of 8 bits are high bytes alone.
    *scales++ = bound / (plane.int8 ? 127 * 256.0F : kLargest);
    const float inverse = bound > 1e-30F ? (plane.int8 ? 127 : kLargest) / bound : 0;
    const __m128i shift = _mm_cvtsi32_si128(plane.int8 ? 8 : 0);
    for (int64_t j = start; j < end; j += 4, tables += 32) {
      const __m256 low_two = _mm256_setr_ps(-x[j] - x[j + 1], x[j] - x[j + 1], x[j + 1] - x[j], x[j] + x[j + 1],  //
                                            -x[j] - x[j + 1], x[j] - x[j + 1], x[j + 1] - x[j], x[j] + x[j + 1]);
      const __m256 third = _mm256_setr_m128(_mm_set1_ps(-x[j + 2]), _mm_set1_ps(x[j + 2]));
      const __m256 sum = _mm256_add_ps(low_two, third), last = _mm256_set1_ps(x[j + 3]), factor = _mm256_set1_ps(inverse);
      const __m256i without = _mm256_cvtps_epi32(_mm256_mul_ps(factor, _mm256_sub_ps(sum, last)));
      const __m256i with = _mm256_cvtps_epi32(_mm256_mul_ps(factor, _mm256_add_ps(sum, last)));
      // Two times eight 32-bit sums to sixteen of 16 bits, in order.
      const __m256i both = _mm256_sll_epi16(_mm256_permute4x64_epi64(_mm256_packs_epi32(without, with), 0xd8), shift);
      const __m256i positive = _mm256_xor_si256(both, _mm256_set1_epi16(static_cast<int16_t>(kOffset)));
      const __m256i high = _mm256_srli_epi16(positive, 8), low = _mm256_and_si256(positive, _mm256_set1_epi16(255));
      const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(high, low), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables), bytes);
    }
  }
}

struct Sums {
  __m256i all, upper;
};

TARGET inline void add(Sums& sums, __m256i bytes) {
  sums.all = _mm256_add_epi16(sums.all, bytes);
  sums.upper = _mm256_add_epi16(sums.upper, _mm256_srli_epi16(bytes, 8));
}

// Adds 16 sums of high and low bytes, less what made them unsigned, to rows in order.
TARGET inline void widen(__m256i high, __m256i low, __m256 offset, __m256* rows) {
  for (int half = 0; half < 2; ++half) {
    const __m256i h = _mm256_cvtepu16_epi32(half == 0 ? _mm256_castsi256_si128(high) : _mm256_extracti128_si256(high, 1));
    const __m256i l = _mm256_cvtepu16_epi32(half == 0 ? _mm256_castsi256_si128(low) : _mm256_extracti128_si256(low, 1));
    const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(h, 8), l));
    rows[half] = _mm256_add_ps(rows[half], _mm256_sub_ps(sum, offset));
  }
}

template <bool kInt8>
TARGET void row_tile(const Plane& plane, const uint8_t* data, const uint8_t* table, const float* scales, float* y) {
  const __m256i nibble = _mm256_set1_epi8(0x0f);
  __m256 total[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t start = 0, block = 0; start < plane.in; start += plane.block, ++block) {
    __m256 rows[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    const int64_t end = std::min(plane.in, start + plane.block);
    for (int64_t j = start; j < end;) {
      const int64_t stop = std::min(end, j + 8 * kSafeSteps);
      const __m256 offset = _mm256_set1_ps(static_cast<float>(kOffset) * static_cast<float>((stop - j) / 4));
      Sums high{_mm256_setzero_si256(), _mm256_setzero_si256()}, low = high;
      for (; j < stop; j += 8, data += 32, table += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(data + 2048), _MM_HINT_T0);
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
        const __m256i first = _mm256_and_si256(bits, nibble), second = _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble);
        const auto* lanes = reinterpret_cast<const __m128i*>(table);
        add(high, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(lanes)), first));
        add(high, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(lanes + 2)), second));
        if (kInt8) continue;
        add(low, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(lanes + 1)), first));
        add(low, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(lanes + 3)), second));
      }
      const __m256i high_even = _mm256_sub_epi16(high.all, _mm256_slli_epi16(high.upper, 8));
      const __m256i low_even = _mm256_sub_epi16(low.all, _mm256_slli_epi16(low.upper, 8));
      widen(high_even, low_even, offset, rows);          // rows 0-15
      widen(high.upper, low.upper, offset, rows + 2);  // rows 16-31
    }
    for (int i = 0; i < 4; ++i) {
      if (plane.grouped) rows[i] = _mm256_mul_ps(rows[i], load_half(reinterpret_cast<const uint16_t*>(data) + 8 * i));
      total[i] = _mm256_fmadd_ps(rows[i], _mm256_set1_ps(scales[block]), total[i]);
    }
    if (plane.grouped) data += 64;
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(y + 8 * i, total[i]);
}

void product(const Plane& plane, int64_t first, int64_t last, const uint8_t* const* tables, const float* const* scales, int tokens,
             float* y, int64_t stride) {
  const int64_t bytes = tile_bytes(Layout::rows32, plane);
  for (int64_t tile = first; tile < last; ++tile)
    for (int t = 0; t < tokens; ++t) (plane.int8 ? row_tile<true> : row_tile<false>)(plane, plane.data + tile * bytes, tables[t], scales[t], y + t * stride + tile * 32);
}

}  // namespace

const Level& avx2_level() {
  static const Level level{"avx2", Layout::rows32, load, store, dots, mix, table_bytes, build, product, avx2_rows()};
  return level;
}

}  // namespace bimos
