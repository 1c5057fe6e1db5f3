// Bits of the signs of a matrix, as planes have them: 0 and above is 1.
#pragma once

#include <cstdint>

namespace bimos {

// Of rows first..last of float32 [out, in], whose columns are a multiple of 8; `bits` are those of the whole matrix, [out, in/8].
void sign_bits(const char* level, const float* values, int64_t in, int64_t first, int64_t last, uint8_t* bits);

// Of columns first..last, which become rows: `bits` are [in, out/8]. `out` is a multiple of 8.
void sign_bits_of_columns(const char* level, const float* values, int64_t out, int64_t in, int64_t first, int64_t last, uint8_t* bits);

}  // namespace bimos
