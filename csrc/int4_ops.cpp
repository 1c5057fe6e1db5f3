// Rows of 4 bits as ops: `bimos.kernels.native` packs with them, and tests multiply.
#include <algorithm>
#include <array>
#include <vector>

#include "int4.h"
#include "tensors.h"

namespace bimos {
namespace {

// uint8 [tiles, bytes] of rows [rows, n], int8 or any dtype; the latter divided by `scale` [rows], float32. `importance`
// float32 [n]: how much an input's error counts.
Tensor pack(const Tensor& weight, const Optional& scale, const Optional& importance) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0, "weight must be [rows, n]");
  const int64_t rows = weight.size(0), n = weight.size(1);
  const std::optional<Dtype> dtype = dtype_of(weight);
  STD_TORCH_CHECK(dtype || weight.scalar_type() == ScalarType::Char, "weight must be int8, float16, bfloat16 or float32");
  STD_TORCH_CHECK(!scale || (scale->scalar_type() == ScalarType::Float && scale->numel() == rows), "scale must be float32 [rows]");
  STD_TORCH_CHECK(!importance || (importance->scalar_type() == ScalarType::Float && importance->numel() == n), "importance must be float32 [n]");
  std::vector<float> shares(static_cast<size_t>(n), 1.0F);
  if (importance) std::copy_n(static_cast<const float*>(torch::stable::contiguous(*importance).const_data_ptr()), n, shares.begin());
  const Tensor values = torch::stable::contiguous(weight);
  Optional scales;
  if (scale) scales = torch::stable::contiguous(*scale);
  const auto* data = static_cast<const char*>(values.const_data_ptr());
  const auto* factors = scales ? static_cast<const float*>(scales->const_data_ptr()) : nullptr;
  const int64_t bytes = int4_tile_bytes(n);
  Tensor tiles = torch::stable::new_empty(weight, std::array<int64_t, 2>{int4_tiles(rows), bytes}, ScalarType::Byte);
  auto* to = static_cast<uint8_t*>(tiles.mutable_data_ptr());
  torch::stable::parallel_for(0, int4_tiles(rows), 16, [&](int64_t begin, int64_t end) {
    std::vector<float> floats(static_cast<size_t>(kTileRows * n));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileRows, count = std::min(kTileRows, rows - first);
      for (int64_t r = 0; r < count; ++r) {
        float* row = floats.data() + r * n;
        if (dtype) {
          level().load(data + (first + r) * n * size_of(*dtype), *dtype, n, row);
        } else {
          std::copy_n(reinterpret_cast<const int8_t*>(data) + (first + r) * n, n, row);
        }
        const float factor = factors != nullptr && factors[first + r] > 0 ? 1.0F / factors[first + r] : 1.0F;
        for (int64_t j = 0; j < n; ++j) row[j] *= factor;
      }
      int4_pack(level().name, floats.data(), shares.data(), count, n, to + tile * bytes);
    }
  });
  return tiles;
}

// y [tokens, rows] = x [tokens, n] times the rows of such tiles; float32.
Tensor multiply(const Tensor& x, const Tensor& tiles, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, "x must be float32 [tokens, n]");
  const int64_t tokens = x.size(0), n = x.size(1);
  STD_TORCH_CHECK(tiles.dim() == 2 && tiles.scalar_type() == ScalarType::Byte && tiles.size(0) == int4_tiles(rows) &&
                      tiles.size(1) == int4_tile_bytes(n),
                  "the tiles are not those of ", rows, " rows of ", n);
  const Tensor values = torch::stable::contiguous(x), packed = torch::stable::contiguous(tiles);
  Tensor y = torch::stable::new_empty(x, std::array<int64_t, 2>{tokens, rows});
  const auto bytes = static_cast<int64_t>(int4_bytes(n));
  std::vector<uint8_t> buffer(static_cast<size_t>(kTokens * bytes + 64));
  uint8_t* aligned = buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64;
  for (int64_t start = 0; start < tokens; start += kTokens) {
    const int few = static_cast<int>(std::min<int64_t>(kTokens, tokens - start));
    const uint8_t* prepared[kTokens];
    float* to[kTokens];
    for (int t = 0; t < few; ++t) {
      int4_prepare(static_cast<const float*>(values.const_data_ptr()) + (start + t) * n, n, aligned + t * bytes);
      prepared[t] = aligned + t * bytes;
      to[t] = static_cast<float*>(y.mutable_data_ptr()) + (start + t) * rows;
    }
    level().rows.int4(static_cast<const uint8_t*>(packed.const_data_ptr()), rows, n, prepared, few, to);
  }
  return y;
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_FRAGMENT(bimos, library) {
  library.def("int4_pack(Tensor weight, Tensor? scale, Tensor? importance) -> Tensor");
  library.def("int4_multiply(Tensor x, Tensor tiles, int rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(bimos, CPU, library) {
  library.impl("int4_pack", TORCH_BOX(&bimos::pack));
  library.impl("int4_multiply", TORCH_BOX(&bimos::multiply));
}
