#include "model.h"

namespace bimos {

void table_rows(const Level& level, const maths::Maths& maths, const Table& table, int64_t n, int64_t first, int64_t last,
                const float* x, int64_t stride, int64_t count, float* const* y) {
  if (table.tiled) return bytes::product(static_cast<const uint8_t*>(table.rows), table.scale, n, first, last, x, stride, count, y);
  thread_local std::vector<uint8_t> prepared_buffer;
  thread_local std::vector<float> row_buffer;
  const Rows& products = level.rows;
  const int64_t rows = last - first;
  if (table.scale == nullptr) {
    row_buffer.resize(static_cast<size_t>(n));
    float* row = row_buffer.data();
    for (int64_t r = 0; r < rows; ++r) {
      level.load(static_cast<const char*>(table.rows) + (first + r) * n * size_of(table.dtype), table.dtype, n, row);
      for (int64_t t = 0; t < count; ++t) y[t][r] = maths.dot(row, x + t * stride, n);
    }
    return;
  }
  const size_t bytes = table.four_bits ? int4_bytes(n) : products.int8_bytes(n);
  prepared_buffer.resize(kTokens * bytes + 64);
  uint8_t* prepared = prepared_buffer.data();
  prepared += (64 - reinterpret_cast<uintptr_t>(prepared) % 64) % 64;
  const uint8_t* values[kTokens];
  for (int64_t t = 0; t < count; ++t) {
    uint8_t* token = prepared + static_cast<size_t>(t) * bytes;
    (table.four_bits ? int4_prepare : products.int8_prepare)(x + t * stride, n, token);
    values[t] = token;
  }
  if (table.four_bits) {
    products.int4(static_cast<const uint8_t*>(table.rows) + first / kTileRows * int4_tile_bytes(n), rows, n, values, static_cast<int>(count), y);
  } else {
    products.int8(static_cast<const int8_t*>(table.rows) + first * n, rows, n, values, static_cast<int>(count), y);
  }
  for (int64_t t = 0; t < count; ++t) maths.multiply(table.scale + first, rows, y[t]);
}

}  // namespace bimos
