// AVX-512 with VBMI and VNNI: tables of 16-bit sums, looked up by vpermb and added up by vpdpbusd.
//
// Sixteen signed sums of four inputs make a table; four tables (16 inputs) lie side by side in a register, their high bytes in one
// and their low bytes in another. One index register (a nibble in every byte, plus the number of its table) then looks up 16 rows x 16
// inputs in either, and a dot product with ones adds four bytes to a row's 32-bit sum. Exact but for the rounding of table entries to
// 1/32512 of the largest in their block. Sums of 8 bits have no low bytes: half the work.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "targets.h"
#include "tiles.h"

#define TARGET BIMOS_AVX512

namespace bimos {
namespace {

constexpr float kLargest = 32512;  // 127 * 256: the high byte stays signed
constexpr float kLargestInt8 = 127;
constexpr int64_t kStepTables = 256;  // bytes of the tables of 32 inputs; half of that where sums have 8 bits

TARGET inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1U << n) - 1); }

TARGET inline __m512 load_half(const uint16_t* from, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from));
}

TARGET inline __m512 load_any(const void* from, Dtype dtype, int64_t at, __mmask16 mask) {
  switch (dtype) {
    case Dtype::float32: return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + at);
    case Dtype::float16: return load_half(static_cast<const uint16_t*>(from) + at, mask);
    case Dtype::bfloat16: break;
  }
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

TARGET void load(const void* from, Dtype dtype, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = first_lanes(n - j);
    _mm512_mask_storeu_ps(to + j, mask, load_any(from, dtype, j, mask));
  }
}

// To bfloat16, to nearest even; NaN stays NaN.
TARGET inline __m256i round_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

TARGET void store(const float* from, Dtype dtype, int64_t n, void* to) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = first_lanes(n - j);
    const __m512 value = _mm512_maskz_loadu_ps(mask, from + j);
    if (dtype == Dtype::float32) {
      _mm512_mask_storeu_ps(static_cast<float*>(to) + j, mask, value);
    } else {
      const __m256i half = dtype == Dtype::bfloat16 ? round_bfloat16(value) : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + j, mask, half);
    }
  }
}

template <int kRows>
TARGET void dot_rows(const float* x, const uint16_t* rows, int64_t n, float* out) {
  __m512 sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = first_lanes(n - j);
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + j);
    for (int r = 0; r < kRows; ++r) sums[r] = _mm512_fmadd_ps(value, load_half(rows + r * n + j, mask), sums[r]);
  }
  for (int r = 0; r < kRows; ++r) out[r] = _mm512_reduce_add_ps(sums[r]);
}

TARGET void dots(const float* x, const uint16_t* rows, int64_t count, int64_t n, float* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dot_rows<4>(x, rows + r * n, n, out + r);
  for (; r < count; ++r) dot_rows<1>(x, rows + r * n, n, out + r);
}

TARGET void mix(const float* x, const float* gate, const uint16_t* rows, int64_t count, int64_t stride, int64_t n, float* out) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 mask = first_lanes(n - j);
    __m512 scale = _mm512_setzero_ps();
    for (int64_t e = 0; e < count; ++e) scale = _mm512_fmadd_ps(_mm512_set1_ps(gate[e]), load_half(rows + e * stride + j, mask), scale);
    _mm512_mask_storeu_ps(out + j, mask, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, x + j)));
  }
}

size_t table_bytes(int64_t in) { return static_cast<size_t>(ceil_div(in, 32) * kStepTables); }

// `factor` with the sign that bit `bit` of the lane's number asks for.
TARGET inline __m512 signed_factor(int bit, float factor) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-factor), _mm512_test_epi32_mask(lane, _mm512_set1_epi32(1 << bit)), _mm512_set1_ps(factor));
}

// The sums of four inputs under all signs, times the factor; lane i has input b positive where bit b of i is set.
TARGET inline __m512i table_of(const float* x, const __m512* factors) {
  __m512 sum = _mm512_mul_ps(_mm512_set1_ps(x[0]), factors[0]);
  for (int bit = 1; bit < 4; ++bit) sum = _mm512_fmadd_ps(_mm512_set1_ps(x[bit]), factors[bit], sum);
  return _mm512_cvtps_epi32(sum);
}

// Where the low bytes of four tables lie, in order, when two and two are packed to 16 bits: byte i of a table is in its lane i / 4.
struct Places {
  alignas(64) uint8_t low[64], high[64];
};

constexpr Places kPlaces = [] {
  Places places{};
  for (int table = 0; table < 4; ++table) {
    for (int i = 0; i < 16; ++i) {
      const int at = table / 2 * 64 + i / 4 * 16 + table % 2 * 8 + i % 4 * 2;
      places.low[16 * table + i] = static_cast<uint8_t>(at);
      places.high[16 * table + i] = static_cast<uint8_t>(at + 1);
    }
  }
  return places;
}();

TARGET inline float largest_sum(const float* x, int64_t n) {  // of |x| over four inputs; NaN where any input is not finite
  __m512 most = _mm512_setzero_ps(), strange = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) {
    __m512 value = _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - j), x + j));
    strange = _mm512_add_ps(strange, _mm512_sub_ps(value, value));
    value = _mm512_add_ps(value, _mm512_permute_ps(value, 0xb1));
    value = _mm512_add_ps(value, _mm512_permute_ps(value, 0x4e));
    most = _mm512_max_ps(most, value);
  }
  return _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(strange);
}

TARGET void build(const float* x, const Plane& plane, uint8_t* tables, float* scales) {
  const __m512i low = _mm512_load_si512(kPlaces.low), high = _mm512_load_si512(kPlaces.high);
  const float top = plane.int8 ? kLargestInt8 : kLargest;
  for (int64_t start = 0; start < plane.in; start += plane.block) {
    const int64_t end = std::min(plane.in, start + plane.block);
    const float most = largest_sum(x + start, end - start);
    *scales++ = most / top;
    const float factor = most > 1e-30F ? top / most : 0.0F;  // finite: below, all is next to nothing
    const __m512 factors[4] = {signed_factor(0, factor), signed_factor(1, factor), signed_factor(2, factor), signed_factor(3, factor)};
    for (int64_t j = start; j < end; j += 32) {
      for (int half = 0; half < 2; ++half) {
        const float* inputs = x + j + 16 * half;
        const __m512i first = _mm512_packs_epi32(table_of(inputs, factors), table_of(inputs + 4, factors));
        const __m512i second = _mm512_packs_epi32(table_of(inputs + 8, factors), table_of(inputs + 12, factors));
        if (!plane.int8) {
          _mm512_storeu_si512(tables, _mm512_permutex2var_epi8(first, high, second));
          tables += 64;
        }
        _mm512_storeu_si512(tables, _mm512_permutex2var_epi8(first, low, second));
        tables += 64;
      }
    }
  }
}

// kSixteens times 16 rows of one row tile, inputs of blocks [first, last); adds to `y` unless it is the first panel.
template <int kCount, int kSixteens, bool kInt8>
TARGET inline void strip(const Plane& plane, const uint8_t* data, int64_t first, int64_t last, const uint8_t* const* tables,
                         const float* const* scales, float* y, int64_t stride, int sixteen) {
  const __m512i number = _mm512_set1_epi32(0x30201000), nibble = _mm512_set1_epi8(0x0f), ones = _mm512_set1_epi8(1);
  const int64_t whole = ceil_div(plane.block, 32);
  __m512 total[kCount][kSixteens];
  for (int t = 0; t < kCount; ++t)
    for (int m = 0; m < kSixteens; ++m)
      total[t][m] = first == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(y + t * stride + 16 * (sixteen + m));
  for (int64_t block = first; block < last; ++block) {
    const int64_t steps = std::min(whole, ceil_div(plane.in - block * plane.block, 32));
    __m512i high[kCount][kSixteens], low[kCount][kSixteens];
    for (int t = 0; t < kCount; ++t)
      for (int m = 0; m < kSixteens; ++m) high[t][m] = low[t][m] = _mm512_setzero_si512();
    constexpr int64_t kBytes = kInt8 ? kStepTables / 2 : kStepTables, kOdd = kBytes / 2;
    const int64_t offset = block * whole * kBytes;
    for (int64_t step = 0; step < steps; ++step, data += 256) {
      _mm_prefetch(reinterpret_cast<const char*>(data + 4096), _MM_HINT_T0);
      if (kSixteens > 1) _mm_prefetch(reinterpret_cast<const char*>(data + 4096 + 64), _MM_HINT_T0);
      if (kSixteens > 2) {
        _mm_prefetch(reinterpret_cast<const char*>(data + 4096 + 128), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(data + 4096 + 192), _MM_HINT_T0);
      }
      for (int m = 0; m < kSixteens; ++m) {
        const __m512i bits = _mm512_loadu_si512(data + 64 * (sixteen + m));
        const __m512i even = _mm512_ternarylogic_epi32(bits, nibble, number, 0xea);  // bits & nibble | number
        const __m512i odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bits, 4), nibble, number, 0xea);
        for (int t = 0; t < kCount; ++t) {
          const uint8_t* table = tables[t] + offset + step * kBytes;
          high[t][m] = _mm512_dpbusd_epi32(high[t][m], ones, _mm512_permutexvar_epi8(even, _mm512_loadu_si512(table)));
          high[t][m] = _mm512_dpbusd_epi32(high[t][m], ones, _mm512_permutexvar_epi8(odd, _mm512_loadu_si512(table + kOdd)));
          if (kInt8) continue;
          low[t][m] = _mm512_dpbusd_epi32(low[t][m], _mm512_permutexvar_epi8(even, _mm512_loadu_si512(table + 64)), ones);
          low[t][m] = _mm512_dpbusd_epi32(low[t][m], _mm512_permutexvar_epi8(odd, _mm512_loadu_si512(table + 192)), ones);
        }
      }
    }
    for (int m = 0; m < kSixteens; ++m) {
      const __m512 group = plane.grouped ? load_half(reinterpret_cast<const uint16_t*>(data) + 16 * (sixteen + m), 0xffff)
                                         : _mm512_set1_ps(1.0F);
      for (int t = 0; t < kCount; ++t) {
        const __m512i whole_sum = kInt8 ? high[t][m] : _mm512_add_epi32(_mm512_slli_epi32(high[t][m], 8), low[t][m]);
        const __m512 sum = _mm512_cvtepi32_ps(whole_sum);
        total[t][m] = _mm512_fmadd_ps(_mm512_mul_ps(sum, group), _mm512_set1_ps(scales[t][block]), total[t][m]);
      }
    }
    if (plane.grouped) data += 128;
  }
  for (int t = 0; t < kCount; ++t)
    for (int m = 0; m < kSixteens; ++m) _mm512_storeu_ps(y + t * stride + 16 * (sixteen + m), total[t][m]);
}

template <int kCount, int kSixteens, bool kInt8>
TARGET void tiles(const Plane& plane, int64_t first, int64_t last, const uint8_t* const* tables, const float* const* scales, float* y,
                  int64_t stride) {
  const int64_t blocks = ceil_div(plane.in, plane.block), bytes = tile_bytes(Layout::rows64, plane);
  const int64_t block_bytes = ceil_div(plane.block, 32) * 256 + (plane.grouped ? 128 : 0);
  // Several tokens' tables are read again for every row: as many blocks at a time as the first cache holds. One token's rows stream by.
  const int64_t panel = kCount == 1 ? blocks : std::max<int64_t>(1, (kInt8 ? 6144 : 3072) / kCount / plane.block);
  for (int64_t block = 0; block < blocks; block += panel) {
    const int64_t end = std::min(blocks, block + panel);
    for (int64_t tile = first; tile < last; ++tile) {
      const uint8_t* data = plane.data + tile * bytes + block * block_bytes;
      for (int sixteen = 0; sixteen < 4; sixteen += kSixteens)
        strip<kCount, kSixteens, kInt8>(plane, data, block, end, tables, scales, y + tile * 64, stride, sixteen);
    }
  }
}

template <bool kInt8>
void product_of(const Plane& plane, int64_t first, int64_t last, const uint8_t* const* tables, const float* const* scales, int tokens,
                float* y, int64_t stride) {
  switch (tokens) {
    case 1: return tiles<1, 4, kInt8>(plane, first, last, tables, scales, y, stride);
    case 2: return tiles<2, 4, kInt8>(plane, first, last, tables, scales, y, stride);
    case 3: return tiles<3, kInt8 ? 4 : 2, kInt8>(plane, first, last, tables, scales, y, stride);
    default: return tiles<4, 2, kInt8>(plane, first, last, tables, scales, y, stride);
  }
}

void product(const Plane& plane, int64_t first, int64_t last, const uint8_t* const* tables, const float* const* scales, int tokens, float* y,
             int64_t stride) {
  (plane.int8 ? product_of<true> : product_of<false>)(plane, first, last, tables, scales, tokens, y, stride);
}

}  // namespace

const Level& avx512_level() {
  static const Level level{"avx512", Layout::rows64, load, store, dots, mix, table_bytes, build, product, avx512_rows()};
  return level;
}

const Level& amx_level() {
  static const Level level{"amx", Layout::rows64, load, store, dots, mix, table_bytes, build, product, avx512_rows(), true};
  return level;
}

}  // namespace bimos
