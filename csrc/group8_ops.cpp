// Weights of 8 bits against values rounded by groups, as ops: schemas in bimos/kernels/ops.py.
#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "group8.h"
#include "room.h"
#include "tensors.h"
#include "tiles.h"

namespace bimos {
namespace {

constexpr int64_t kTokensAtATime = 192;  // whose bytes stay in the second cache beside a tile

// Tiles uint8 [tiles, bytes] of a weight [out, in], and the rows' scales, float32 [out].
std::tuple<Tensor, Tensor> pack(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0, "group8_pack: the weight must be [out, in]");
  const std::optional<Dtype> dtype = dtype_of(weight);
  STD_TORCH_CHECK(dtype.has_value(), "group8_pack: the weight must be float16, bfloat16 or float32");
  const int64_t out = weight.size(0), in = weight.size(1), tiles = group8::tiles_of(out), bytes = group8::tile_bytes(in);
  const Tensor rows = compact(weight);
  Tensor packed = torch::stable::new_empty(weight, std::array<int64_t, 2>{tiles, bytes}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(weight, std::array<int64_t, 1>{out}, ScalarType::Float);
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  auto *to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> floats(static_cast<size_t>(group8::kRows * in));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * group8::kRows, count = std::min(group8::kRows, out - first);
      level().load(from + first * in * size_of(*dtype), *dtype, count * in, floats.data());
      group8::pack(floats.data(), count, in, to + tile * bytes, scales + first);
    }
  });
  return {packed, scale};
}

// y [..., out] of x [..., in], both bfloat16; see group8.h.
Tensor linear(const Tensor& x, const Tensor& tiles, const Tensor& scale, const Optional& bias) {
  STD_TORCH_CHECK(dtype_of(x) == Dtype::bfloat16 && x.dim() > 0 && x.size(x.dim() - 1) > 0, "group8_linear: x must be bfloat16 [..., in]");
  const int64_t in = x.size(x.dim() - 1), out = scale.numel(), tokens = x.numel() / in, groups = group8::groups_of(in);
  STD_TORCH_CHECK(scale.dim() == 1 && scale.scalar_type() == ScalarType::Float, "group8_linear: the scale must be float32 [out]");
  STD_TORCH_CHECK(tiles.dim() == 2 && tiles.scalar_type() == ScalarType::Byte && tiles.size(0) == group8::tiles_of(out) &&
                      tiles.size(1) == group8::tile_bytes(in),
                  "group8_linear: the tiles are not those of a weight [", out, ", ", in, "]");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->numel() == out),
                  "group8_linear: the bias must be float32 [out]");
  const Tensor values = compact(x), packed = compact(tiles), scales = compact(scale);
  Optional biases;
  if (bias) biases = compact(*bias);
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) shape[static_cast<size_t>(i)] = i + 1 < x.dim() ? x.size(i) : out;
  Tensor y = torch::stable::new_empty(x, shape);
  const auto* from = static_cast<const uint16_t*>(values.const_data_ptr());
  auto* to = static_cast<uint16_t*>(y.mutable_data_ptr());
  const group8::Weights weights{static_cast<const uint8_t*>(packed.const_data_ptr()), static_cast<const float*>(scales.const_data_ptr()),
                                biases ? static_cast<const float*>(biases->const_data_ptr()) : nullptr, in, out};
  const int64_t words = tokens * groups * group8::kGroup / 4;
  Room room(words + tokens * groups + Room::kLine);
  const group8::Values prepared{reinterpret_cast<uint8_t*>(room.words(words)), room.floats(tokens * groups), tokens};
  const group8::Functions functions = group8::functions_for(level().name);
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, (1 << 16) / in), [&](int64_t begin, int64_t end) { functions.prepare(from, in, begin, end, prepared); });
  const int64_t count = group8::tiles_of(out), parts = (tokens + kTokensAtATime - 1) / kTokensAtATime;
  torch::stable::parallel_for(0, parts * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / count;
      functions.product(weights, i % count, prepared, tokens * part / parts, tokens * (part + 1) / parts, to);
    }
  });
  return y;
}

// y [out, in] = left^T right of [tokens, out] and [tokens, in], all bfloat16; see group8.h.
Tensor outer(const Tensor& left, const Tensor& right) {
  STD_TORCH_CHECK(dtype_of(left) == Dtype::bfloat16 && dtype_of(right) == Dtype::bfloat16 && left.dim() == 2 && right.dim() == 2 && left.size(0) == right.size(0),
                  "group8_outer takes bfloat16 [tokens, out] and [tokens, in]");
  const Tensor lefts = compact(left), rights = compact(right);
  const int64_t tokens = left.size(0), out = left.size(1), in = right.size(1), groups = group8::groups_of(tokens);
  Tensor y = torch::stable::new_empty(left, std::array<int64_t, 2>{out, in});
  auto* to = static_cast<uint16_t*>(y.mutable_data_ptr());
  const group8::Matrix of_left{static_cast<const uint16_t*>(lefts.const_data_ptr()), tokens, out};
  const group8::Matrix of_right{static_cast<const uint16_t*>(rights.const_data_ptr()), tokens, in};
  constexpr int64_t kColumns = group8::kColumns, kRows = group8::kRows;
  const int64_t blocks = ceil_div(out, kColumns), tiles = ceil_div(in, kRows), tile_bytes = groups * group8::kSteppedBytes;
  const int64_t block_words = groups * group8::kGroup / 4 * kColumns, steps = groups * kColumns;
  Room room(blocks * (block_words + steps) + tiles * tile_bytes / 4);
  auto *bytes = reinterpret_cast<uint8_t*>(room.words(blocks * block_words)), *packed = reinterpret_cast<uint8_t*>(room.words(tiles * tile_bytes / 4));
  float* stepped = room.floats(blocks * steps);
  const group8::Functions functions = group8::functions_for(level().name);
  const auto block_of = [&](int64_t i) { return group8::Block{bytes + i * block_words * 4, stepped + i * steps}; };
  torch::stable::parallel_for(0, blocks + tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < blocks) {
        functions.block(of_left, i * kColumns, block_of(i));
      } else {
        functions.tile(of_right, (i - blocks) * kRows, packed + (i - blocks) * tile_bytes);
      }
    }
  });
  torch::stable::parallel_for(0, tiles * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % blocks * kColumns, column = i / blocks * kRows;
      functions.outer(packed + i / blocks * tile_bytes, groups, block_of(i % blocks), std::min(kColumns, out - row), std::min(kRows, in - column), to + row * in + column, in);
    }
  });
  return y;
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_IMPL(bimos, CPU, library) {
  library.impl("group8_pack", TORCH_BOX(&bimos::pack));
  library.impl("group8_linear", TORCH_BOX(&bimos::linear));
  library.impl("group8_outer", TORCH_BOX(&bimos::outer));
}
