// The ops of bimos/kernels/ops.py on a CPU, through LibTorch's stable ABI: checks, pointers, threads. The work is in linear.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "tensors.h"
#include "tiles.h"

// Of torch 2.13, and null before: the message of what the last call threw.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace bimos {

std::optional<Dtype> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: return std::nullopt;
  }
}

Tensor compact(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// Inputs of a block: those of a group where there are groups.
int64_t block_of(const Tensor& weight, const Optional& scale_group, int64_t group_size) {
  const int64_t in = 8 * weight.size(2);
  if (!scale_group) return kBlock;
  const bool matches = scale_group->dim() == 3 && scale_group->size(0) == weight.size(0) && scale_group->size(1) == weight.size(1);
  const int64_t groups = matches ? scale_group->size(2) : 0;
  STD_TORCH_CHECK(groups > 0 && (group_size > 0 ? ceil_div(in, group_size) == groups : in % groups == 0), "scale_group does not fit the planes");
  return group_size > 0 ? group_size : in / groups;
}

// The level in use, or the one below it where groups are too narrow for its steps; null where they fit none.
const Level* level_for(int64_t in, int64_t block) {
  if (fits(level().layout, in, block)) return &level();
#ifdef BIMOS_X86
  if (level().layout == Layout::rows64 && fits(avx2_level().layout, in, block)) return &avx2_level();
#endif
  return nullptr;
}

constexpr int64_t kTilesWorthAThread = 1 << 15;  // bytes

Tensor tile(const Tensor& weight, const Optional& scale_group, int64_t group_size) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.scalar_type() == ScalarType::Byte, "weight must be uint8 [planes, out, in/8]");
  const Tensor bits = compact(weight);
  const int64_t planes = bits.size(0), out = bits.size(1), in = 8 * bits.size(2), block = block_of(bits, scale_group, group_size);
  Optional groups;
  if (scale_group) {
    STD_TORCH_CHECK(scale_group->scalar_type() == ScalarType::Half, "scale_group must be float16 to be tiled");
    groups = compact(*scale_group);
  }
  const Level* used = level_for(in, block);
  if (used == nullptr) return torch::stable::new_empty(weight, std::array<int64_t, 3>{0, 0, 0});
  const Plane plane{nullptr, in, block, groups.has_value(), false};
  const int64_t tiles = tile_count(used->layout, out), bytes = tile_bytes(used->layout, plane);
  Tensor result = torch::stable::new_empty(weight, std::array<int64_t, 3>{planes, tiles, bytes});
  ask_for_large_pages(result.mutable_data_ptr(), static_cast<size_t>(planes * tiles * bytes));
  const int64_t rows = rows_of(used->layout), grain = std::max<int64_t>(1, kTilesWorthAThread / std::max<int64_t>(bytes, 1));
  const auto* from = static_cast<const uint8_t*>(bits.const_data_ptr());
  const auto* scales = groups ? static_cast<const uint16_t*>(groups->const_data_ptr()) : nullptr;
  auto* to = static_cast<uint8_t*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, planes * tiles, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {  // a run of tiles of one plane
      const int64_t p = begin / tiles, first = begin % tiles, count = std::min(tiles - first, end - begin);
      const int64_t row = p * out + first * rows, there = std::min(out - first * rows, count * rows);
      make_tiles(used->layout, from + row * (in / 8), scales == nullptr ? nullptr : scales + row * ceil_div(in, block), there, in, block,
                 to + begin * bytes);
      begin += count;
    }
  });
  return result;
}

void call(const char* op, StableIValue* stack) {
  if (torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION) == TORCH_SUCCESS) return;
  const char* what = torch_exception_get_what_without_backtrace == nullptr ? nullptr : torch_exception_get_what_without_backtrace();
  throw std::runtime_error(what != nullptr && *what != '\0' ? std::string(what) : std::string(op) + " failed");
}

namespace {

constexpr int64_t kFewTokens = 16;  // more go to torch's own products of dequantised rows, which are faster then

const Pool& pool() {
  static thread_local Pool mine{1, [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
                                  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
                                    for (int64_t index = begin; index < end; ++index) task(index, context);
                                  });
                                }};
  mine.size = torch::stable::get_num_threads();
  return mine;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim()));
  for (int64_t d = 0; d < x.dim(); ++d) sizes[static_cast<size_t>(d)] = x.size(d);
  sizes.back() = last;
  return sizes;
}

Tensor reference(const Tensor& x, const Tensor& weight, const Optional& scale_in, const Optional& scale_out, const Optional& router,
                 const Optional& scale_group, const Optional& bias, int64_t group_size) {
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{from(x),      from(weight),      from(scale_in), from(scale_out),
                                    from(router), from(scale_group), from(bias),     from(group_size)};
  call("bimos::packed_linear_reference", stack.data());
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A float16 tensor's values; null where there is none. `held` keeps what had to be made contiguous.
const uint16_t* halves(const Optional& tensor, std::vector<Tensor>& held) {
  if (!tensor) return nullptr;
  held.push_back(compact(*tensor));
  return static_cast<const uint16_t*>(held.back().const_data_ptr());
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, const Optional& scale_in, const Optional& scale_out, const Optional& router,
                     const Optional& scale_group, const Optional& bias, const Optional& tiles, bool int8, int64_t group_size) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.scalar_type() == ScalarType::Byte, "weight must be uint8 [planes, out, in/8]");
  const int64_t planes = weight.size(0), out = weight.size(1), in = 8 * weight.size(2), block = block_of(weight, scale_group, group_size);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == in, "x has ", x.dim() > 0 ? x.size(x.dim() - 1) : 0, " features, the planes ", in);
  const int64_t experts = router ? router->size(0) : 1;
  const std::array<std::pair<const Optional*, int64_t>, 3> sizes{
      {{&scale_in, planes * experts * in}, {&scale_out, planes * experts * out}, {&router, experts * in}}};
  bool halves_only = !scale_group || scale_group->scalar_type() == ScalarType::Half;
  for (const auto& [tensor, size] : sizes) {
    if (!*tensor) continue;
    STD_TORCH_CHECK((*tensor)->numel() == size, "scales or router do not fit the planes");
    halves_only = halves_only && (*tensor)->scalar_type() == ScalarType::Half;
  }
  STD_TORCH_CHECK(!bias || bias->numel() == out, "bias does not fit the planes");
  const Level* used = level_for(in, block);
  const std::optional<Dtype> dtype = dtype_of(x), bias_dtype = bias ? dtype_of(*bias) : Dtype::float32;
  if (!dtype || !bias_dtype || !halves_only || used == nullptr || x.numel() == 0) {
    return reference(x, weight, scale_in, scale_out, router, scale_group, bias, group_size);
  }
  const Plane plane{nullptr, in, block, scale_group.has_value(), int8};
  std::vector<Tensor> held;
  held.reserve(6);
  const bool made = tiles && tiles->dim() == 3 && tiles->size(0) == planes && tiles->size(1) == tile_count(used->layout, out) &&
                    tiles->size(2) == tile_bytes(used->layout, plane);
  held.push_back(made ? compact(*tiles) : tile(weight, scale_group, group_size));
  Linear linear{in, out, planes, experts, block, scale_group.has_value(), int8, nullptr, nullptr, nullptr, nullptr, nullptr, Dtype::float32, nullptr};
  linear.tiles = static_cast<const uint8_t*>(held.back().const_data_ptr());
  linear.scale_in = halves(scale_in, held);
  linear.scale_out = halves(scale_out, held);
  linear.router = halves(router, held);
  if (bias) {
    held.push_back(compact(*bias));
    linear.bias = held.back().const_data_ptr();
    linear.bias_dtype = *bias_dtype;
  }
  held.push_back(compact(x));
  Tensor y = torch::stable::new_empty(x, with_last(x, out));
  apply(*used, linear, held.back().const_data_ptr(), *dtype, x.numel() / in, y.mutable_data_ptr(), pool());
  return y;
}

Tensor as_float(const Tensor& tensor) {
  const Tensor floats = tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
  return compact(floats);
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const Optional& bias) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Char, "weight must be int8 [out, in]");
  const int64_t out = weight.size(0), in = weight.size(1);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == in, "x has ", x.dim() > 0 ? x.size(x.dim() - 1) : 0, " features, the head ", in);
  STD_TORCH_CHECK(scale.numel() == out && (!bias || bias->numel() == out), "scale or bias does not fit the head");
  const std::optional<Dtype> dtype = dtype_of(x);
  if (!dtype || x.numel() == 0 || x.numel() / in > kFewTokens) {
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(x), from(weight), from(scale), from(bias)};
    call("bimos::int8_linear_reference", stack.data());
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const Tensor values = compact(x), rows = compact(weight), factors = as_float(scale);
  Optional offsets;
  if (bias) offsets = as_float(*bias);
  Tensor y = torch::stable::new_empty(x, with_last(x, out));
  apply_int8(level(), static_cast<const int8_t*>(rows.const_data_ptr()), static_cast<const float*>(factors.const_data_ptr()),
             offsets ? static_cast<const float*>(offsets->const_data_ptr()) : nullptr, in, out, values.const_data_ptr(), *dtype,
             x.numel() / in, y.mutable_data_ptr(), pool());
  return y;
}

bool use_isa(const std::string& name) { return use_level(name.c_str()); }

std::string isa() { return level().name; }

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_FRAGMENT(bimos, library) {
  library.def("tile(Tensor weight, Tensor? scale_group, int group_size=0) -> Tensor");
  library.def("use_isa(str name) -> bool");
  library.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bimos, CPU, library) {
  library.impl("tile", TORCH_BOX(&bimos::tile));
  library.impl("packed_linear", TORCH_BOX(&bimos::packed_linear));
  library.impl("int8_linear", TORCH_BOX(&bimos::int8_linear));
}

STABLE_TORCH_LIBRARY_IMPL(bimos, CompositeExplicitAutograd, library) {
  library.impl("use_isa", TORCH_BOX(&bimos::use_isa));
  library.impl("isa", TORCH_BOX(&bimos::isa));
}
