// What training has beside torch (bimos/methods/mixing.py, ste.py): scales mixed per token and their gradients, signs as bits.
#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <vector>

#include "mixing.h"
#include "signs.h"
#include "tensors.h"
#include "tiles.h"

namespace bimos {
namespace {

using mixing::Batch;

// Checks and pointers that forward and backward have in common. `held` keeps what had to be made contiguous.
struct Prepared {
  Batch batch{};
  mixing::Functions functions;
  int64_t tokens, experts;
  std::vector<Tensor> held;

  const void* values(const Tensor& tensor) {
    held.push_back(compact(tensor));
    return held.back().const_data_ptr();
  }

  Prepared(const Tensor& x, const Tensor& scales, const Optional& gate, const Optional& router)
      : functions(mixing::functions_for(level().name, scales.size(0))), experts(scales.size(0)) {
    held.reserve(8);
    const std::optional<Dtype> dtype = dtype_of(x);
    STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::bfloat16, "mix: x must be float32 or bfloat16");
    STD_TORCH_CHECK(functions.forward != nullptr, "mix: ", experts, " experts");
    STD_TORCH_CHECK(x.dim() > 0 && scales.dim() == 2 && x.size(x.dim() - 1) == scales.size(1), "mix: x and scales do not fit");
    batch.n = scales.size(1);
    tokens = batch.n == 0 ? 0 : x.numel() / batch.n;
    batch.is_float = *dtype == Dtype::float32;
    batch.x = values(x);
    batch.scales = floats(scales, experts * batch.n);
    if (router) batch.router = floats(*router, experts * batch.n);
    if (gate) batch.gate = const_cast<float*>(floats(*gate, tokens * experts));  // read only where it is given
    STD_TORCH_CHECK(gate || router || experts == 1, "mix: several experts and no gate");
  }

  const float* floats(const Tensor& tensor, int64_t size) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == size, "mix: gates, scales and routers are float32");
    return static_cast<const float*>(values(tensor));
  }

  // `run(first, last, part)` over parts of the tokens, in as many threads as torch has.
  template <typename Run>
  void in_parts(int64_t parts, Run run) const {
    const auto one = [&](int64_t part) { run(tokens * part / parts, tokens * (part + 1) / parts, part); };
    if (parts == 1) return one(0);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) one(part);
    });
  }

  int64_t parts() const {
    constexpr int64_t kWorthAThread = 1 << 15;  // values
    return std::clamp<int64_t>(tokens * batch.n / kWorthAThread, 1, torch::stable::get_num_threads());
  }
};

Tensor zeros(const Tensor& like, std::array<int64_t, 2> sizes) {
  Tensor result = torch::stable::new_empty(like, sizes);
  std::fill_n(static_cast<float*>(result.mutable_data_ptr()), sizes[0] * sizes[1], 0.0F);  // not memset: of nothing, the address is null
  return result;
}

Tensor mix(const Tensor& x, const Optional& gate, const Tensor& scales) {
  Prepared prepared(x, scales, gate, std::nullopt);
  Tensor out = torch::stable::empty_like(prepared.held[0]);
  prepared.batch.out = out.mutable_data_ptr();
  prepared.in_parts(prepared.parts(), [&](int64_t first, int64_t last, int64_t) { prepared.functions.forward(prepared.batch, first, last); });
  return out;
}

std::tuple<Tensor, Tensor> route_and_mix(const Tensor& x, const Tensor& router, const Tensor& scales) {
  Prepared prepared(x, scales, std::nullopt, router);
  Tensor out = torch::stable::empty_like(prepared.held[0]);
  Tensor gate = torch::stable::new_empty(scales, std::array<int64_t, 2>{prepared.tokens, prepared.experts});
  prepared.batch.out = out.mutable_data_ptr();
  prepared.batch.gate = static_cast<float*>(gate.mutable_data_ptr());
  prepared.in_parts(prepared.parts(), [&](int64_t first, int64_t last, int64_t) { prepared.functions.forward(prepared.batch, first, last); });
  return {out, gate};
}

// Gradients of x, of the gate (or, with a router, of that) and of the scales.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Optional& grad_gate, const Tensor& x, const Optional& gate,
                                            const Optional& router, const Tensor& scales) {
  Prepared prepared(x, scales, gate, router);
  Batch& batch = prepared.batch;
  const int64_t experts = prepared.experts, n = batch.n, parts = prepared.parts();
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel(), "mix: a gradient of another dtype or shape");
  batch.grad = prepared.values(grad);
  Tensor of_x = torch::stable::empty_like(prepared.held[0]);
  batch.out = of_x.mutable_data_ptr();
  Tensor of_gate = torch::stable::new_empty(scales, std::array<int64_t, 2>{gate ? prepared.tokens : 0, experts});
  batch.grad_gate = static_cast<float*>(of_gate.mutable_data_ptr());
  if (router) {
    STD_TORCH_CHECK(gate && grad_gate, "mix: a router needs its gate and the gradient of that");
    batch.grad_gate = const_cast<float*>(prepared.floats(*grad_gate, prepared.tokens * experts));  // read only
  }
  Tensor of_scales = zeros(scales, {parts * experts, n}), of_router = zeros(scales, {router ? parts * experts : 0, n});
  auto *scale_sums = static_cast<float*>(of_scales.mutable_data_ptr()), *router_sums = static_cast<float*>(of_router.mutable_data_ptr());
  prepared.in_parts(parts, [&](int64_t first, int64_t last, int64_t part) {
    Batch own = batch;
    own.grad_scales = scale_sums + part * experts * n;
    own.grad_router = router_sums + part * experts * n;
    prepared.functions.backward(own, first, last);
  });
  for (int64_t i = experts * n; i < parts * experts * n; ++i) {
    scale_sums[i % (experts * n)] += scale_sums[i];
    if (router) router_sums[i % (experts * n)] += router_sums[i];
  }
  if (parts > 1) of_scales = compact(torch::stable::narrow(of_scales, 0, 0, experts));
  if (parts > 1 && router) of_router = compact(torch::stable::narrow(of_router, 0, 0, experts));
  return {of_x, router ? of_router : of_gate, of_scales};
}

// Bits of the signs (0 and above is 1) of a float32 matrix [out, in], or of its transpose: uint8 [1, rows, columns / 8].
Tensor bits_of_signs(const Tensor& latent, bool transposed) {
  STD_TORCH_CHECK(latent.dim() == 2 && latent.scalar_type() == ScalarType::Float, "sign_bits takes a float32 matrix");
  const Tensor source = compact(latent);
  const int64_t out = latent.size(0), in = latent.size(1), rows = transposed ? in : out, columns = transposed ? out : in;
  STD_TORCH_CHECK(columns % 8 == 0, "sign_bits: ", columns, " columns are no multiple of 8");
  Tensor result = torch::stable::new_empty(latent, std::array<int64_t, 3>{1, rows, columns / 8}, ScalarType::Byte);
  const auto* values = static_cast<const float*>(source.const_data_ptr());
  auto* bits = static_cast<uint8_t*>(result.mutable_data_ptr());
  // Columns are shared out, as rows of the result, in whole lines of the source.
  constexpr int64_t kWorthAThread = 1 << 15, kLine = 16;
  const int64_t lines = ceil_div(rows, kLine), grain = std::max<int64_t>(1, kWorthAThread / (kLine * std::max<int64_t>(columns, 1)));
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLine, last = std::min(rows, end * kLine);
    if (transposed) {
      sign_bits_of_columns(level().name, values, out, in, first, last, bits);
    } else {
      sign_bits(level().name, values, in, first, last, bits);
    }
  });
  return result;
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_FRAGMENT(bimos, library) {
  library.def("mix(Tensor x, Tensor? gate, Tensor scales) -> Tensor");
  library.def("sign_bits(Tensor latent, bool transposed) -> Tensor");
  library.def("route_and_mix(Tensor x, Tensor router, Tensor scales) -> (Tensor, Tensor)");
  library.def(
      "mix_backward(Tensor grad, Tensor? grad_gate, Tensor x, Tensor? gate, Tensor? router, Tensor scales) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bimos, CPU, library) {
  library.impl("mix", TORCH_BOX(&bimos::mix));
  library.impl("sign_bits", TORCH_BOX(&bimos::bits_of_signs));
  library.impl("route_and_mix", TORCH_BOX(&bimos::route_and_mix));
  library.impl("mix_backward", TORCH_BOX(&bimos::backward));
}
