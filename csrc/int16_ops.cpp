// Products in whole numbers of 16 bits, as ops: schemas in bimos/kernels/ops.py.
#include <algorithm>
#include <array>
#include <vector>

#include "int16.h"
#include "room.h"
#include "tensors.h"

namespace bimos {
namespace {

using int16::Groups;
using int16::kLeft;
using int16::kRight;
using int16::Matrix;

constexpr int64_t kPanelsAtATime = 32;  // of the left side, which stay in the second cache beside one of the right side

bool is_float_matrix(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2; }

const float* floats_of(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// Panels of a matrix's rows.
void pack(const Matrix& matrix, int64_t width, int32_t* panels) {
  const int16::Functions functions = int16::functions_for(level().name);
  const int64_t words = Groups(matrix.inputs).words(width), grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, words));
  torch::stable::parallel_for(0, ceil_div(matrix.last, width), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      functions.pack({matrix.values, matrix.inputs, i * width, std::min(matrix.last, (i + 1) * width), matrix.row, matrix.input}, width, panels + i * words);
  });
}

// y [rows, columns] of panels.
void multiply(const int32_t* left, const int32_t* right, const Groups& groups, const float* bias, int64_t rows, int64_t columns, float* y) {
  const int16::Functions functions = int16::functions_for(level().name);
  const int64_t lefts = ceil_div(rows, kLeft), rights = ceil_div(columns, kRight), parts = ceil_div(lefts, kPanelsAtATime);
  torch::stable::parallel_for(0, parts * rights, 4, [&](int64_t begin, int64_t end) {
    alignas(64) float total[kLeft * kRight];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / rights, column = i % rights * kRight, count = std::min(kRight, columns - column);
      float plain[kRight] = {};
      if (bias != nullptr) std::copy(bias + column, bias + column + count, plain);
      for (int64_t panel = lefts * part / parts; panel < lefts * (part + 1) / parts; ++panel) {
        functions.product(left + panel * groups.words(kLeft), right + i % rights * groups.words(kRight), groups, total);
        for (int64_t m = 0; m < std::min(kLeft, rows - panel * kLeft); ++m) {
          float* to = y + (panel * kLeft + m) * columns + column;
          if (count == kRight) {
            for (int64_t n = 0; n < kRight; ++n) to[n] = total[m * kRight + n] + plain[n];
          } else {
            for (int64_t n = 0; n < count; ++n) to[n] = total[m * kRight + n] + plain[n];
          }
        }
      }
    }
  });
}

// Panels int32 [panels, words] of a weight [out, in].
Tensor int16_pack(const Tensor& weight) {
  STD_TORCH_CHECK(is_float_matrix(weight) && weight.size(1) > 0, "int16_pack: the weight must be float32 [out, in]");
  const Tensor rows = compact(weight);
  const int64_t out = weight.size(0), in = weight.size(1);
  Tensor panels = torch::stable::new_empty(weight, std::array<int64_t, 2>{ceil_div(out, kRight), Groups(in).words(kRight)}, ScalarType::Int);
  pack({floats_of(rows), in, 0, out, in, 1}, kRight, static_cast<int32_t*>(panels.mutable_data_ptr()));
  return panels;
}

// y [..., out] of x [..., in] and a packed weight [out, in].
Tensor int16_linear(const Tensor& x, const Tensor& panels, int64_t out, const Optional& bias) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() > 0 && x.size(x.dim() - 1) > 0, "int16_linear: x must be float32 [..., in]");
  const int64_t in = x.size(x.dim() - 1), tokens = x.numel() / in;
  const Groups groups(in);
  STD_TORCH_CHECK(panels.dim() == 2 && panels.scalar_type() == ScalarType::Int && panels.size(0) == ceil_div(out, kRight) && panels.size(1) == groups.words(kRight),
                  "int16_linear: the panels are not those of a weight [", out, ", ", in, "]");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->numel() == out),
                  "int16_linear: the bias must be float32 [out]");
  const Tensor values = compact(x), packed = compact(panels);
  Optional biases;
  if (bias) biases = compact(*bias);
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) shape[static_cast<size_t>(i)] = i + 1 < x.dim() ? x.size(i) : out;
  Tensor y = torch::stable::new_empty(x, shape);
  Room room(ceil_div(tokens, kLeft) * groups.words(kLeft));
  auto* left = reinterpret_cast<int32_t*>(room.words(ceil_div(tokens, kLeft) * groups.words(kLeft)));
  pack({floats_of(values), in, 0, tokens, in, 1}, kLeft, left);
  multiply(left, static_cast<const int32_t*>(packed.const_data_ptr()), groups, biases ? floats_of(*biases) : nullptr, tokens, out,
           static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

// y [out, in] = left^T right of [tokens, out] and [tokens, in].
Tensor int16_outer(const Tensor& left, const Tensor& right) {
  STD_TORCH_CHECK(is_float_matrix(left) && is_float_matrix(right) && left.size(0) == right.size(0), "int16_outer takes float32 [tokens, out] and [tokens, in]");
  const Tensor lefts = compact(left), rights = compact(right);
  const int64_t tokens = left.size(0), out = left.size(1), in = right.size(1);
  const Groups groups(tokens);
  Tensor y = torch::stable::new_empty(left, std::array<int64_t, 2>{out, in});
  const int64_t left_words = ceil_div(out, kLeft) * groups.words(kLeft), right_words = ceil_div(in, kRight) * groups.words(kRight);
  Room room(left_words + right_words + Room::kLine);
  auto *left_panels = reinterpret_cast<int32_t*>(room.words(left_words)), *right_panels = reinterpret_cast<int32_t*>(room.words(right_words));
  pack({floats_of(lefts), tokens, 0, out, 1, out}, kLeft, left_panels);
  pack({floats_of(rights), tokens, 0, in, 1, in}, kRight, right_panels);
  multiply(left_panels, right_panels, groups, nullptr, out, in, static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_IMPL(bimos, CPU, library) {
  library.impl("int16_pack", TORCH_BOX(&bimos::int16_pack));
  library.impl("int16_linear", TORCH_BOX(&bimos::int16_linear));
  library.impl("int16_outer", TORCH_BOX(&bimos::int16_outer));
}
