// The matrix unit (AMX): eight tiles of 16 rows x 64 bytes, each pair of which adds a [16, 16] of 32 bits to a third.
//
// Rows of words go in from the left, a word being two values of bfloat16 or four bytes side by side along the depth of the product;
// from the right a matrix whose row p holds, for each of 16 columns, word p of the depth.
//
// Instructions are written out: GCC 12's intrinsics say nothing of the memory that they read and write, and stores before them are lost.
#pragma once

#include <cstdint>

#include "targets.h"

namespace bimos::amx {

constexpr int64_t kRows = 16, kWords = 16;  // of a tile

// Whether the processor has it and the system lets this process use it.
bool is_usable();

#ifdef BIMOS_X86
struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];

  // Tiles from `rights` on are right sides, those before them sums and left sides, of `left` rows.
  constexpr Shapes(int64_t left, int rights) : rows{} {
    for (int tile = 0; tile < 8; ++tile) rows[tile] = static_cast<uint8_t>(tile < rights ? left : kRows);
  }
};

// All eight tiles are this thread's for as long as it lives. Not to be nested; nothing else that uses tiles may be called meanwhile. Few rows on the left save
// loading them: a product with another right side takes 16 cycles all the same.
class Tiles {
 public:
  explicit Tiles(int64_t left = kRows, int rights = 6) {
    const Shapes shapes(left, rights);
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
  }
  ~Tiles() {
    if (before_.palette != 0) {  // of a library that configures once for all
      asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");
    } else {
      asm volatile("tilerelease" ::: "memory");
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  Shapes before_{0, 0};
};

template <int kTile>
BIMOS_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// `stride` in bytes from row to row.
template <int kTile>
BIMOS_INLINE void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
BIMOS_INLINE void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}

// kSums += kLeft kRight, of bfloat16 in float32.
template <int kSums, int kLeft, int kRight>
BIMOS_INLINE void add_bfloat16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

// The same of bytes, signed on both sides, in 32 bits.
template <int kSums, int kLeft, int kRight>
BIMOS_INLINE void add_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}
#endif

}  // namespace bimos::amx
