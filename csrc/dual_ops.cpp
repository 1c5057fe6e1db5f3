// Weights of two planes of zeros and ones as ops, for training (bimos/methods/dbllm.py).
#include <algorithm>
#include <array>
#include <tuple>

#include "dual.h"
#include "tensors.h"

namespace bimos {
namespace {

struct DualGiven {
  dual::Weights weights{};
  Tensor latent, scale;

  DualGiven(const Tensor& latents, const Tensor& scales, int64_t group, bool in_steps) : latent(compact(latents)), scale(compact(scales)) {
    STD_TORCH_CHECK(latents.dim() == 2 && latents.scalar_type() == ScalarType::Float && scales.dim() == 3 && scales.scalar_type() == ScalarType::Float,
                    "dual_weight takes float32 latents [out, in] and scales [2, out, groups]");
    weights.out = latents.size(0);
    weights.in = latents.size(1);
    weights.group = group;
    weights.in_steps = in_steps;
    STD_TORCH_CHECK(group > 0 && scales.size(0) == 2 && scales.size(1) == weights.out && scales.size(2) == weights.groups(),
                    "dual_weight: scales do not fit latents in groups of ", group);
    weights.latent = static_cast<const float*>(latent.const_data_ptr());
    weights.scale = static_cast<const float*>(scale.const_data_ptr());
  }

  void run(dual::Function function) const {
    constexpr int64_t kWorthAThread = 1 << 15;  // values
    const int64_t rows = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(weights.in, 1));
    torch::stable::parallel_for(0, weights.out, rows, [&](int64_t begin, int64_t end) { function(weights, begin, end); });
  }
};

// Weights [out, in], in bfloat16 where `halves`.
Tensor dual_weight(const Tensor& latent, const Tensor& scale, int64_t group, bool in_steps, bool halves) {
  DualGiven given(latent, scale, group, in_steps);
  Tensor out = torch::stable::new_empty(latent, std::array<int64_t, 2>{given.weights.out, given.weights.in},
                                        halves ? ScalarType::BFloat16 : ScalarType::Float);
  given.weights.is_float = !halves;
  given.weights.weight = out.mutable_data_ptr();
  given.run(dual::functions_for(level().name).forward);
  return out;
}

// Gradients of the latents and of the scales.
std::tuple<Tensor, Tensor> dual_weight_backward(const Tensor& grad, const Tensor& latent, const Tensor& scale, int64_t group, bool in_steps) {
  DualGiven given(latent, scale, group, in_steps);
  const std::optional<Dtype> dtype = dtype_of(grad);
  STD_TORCH_CHECK((dtype == Dtype::float32 || dtype == Dtype::bfloat16) && grad.dim() == 2 && grad.size(0) == given.weights.out &&
                      grad.size(1) == given.weights.in,
                  "dual_weight: a gradient of another dtype or shape");
  const Tensor slopes = compact(grad);
  Tensor of_latent = torch::stable::empty_like(given.latent), of_scale = torch::stable::empty_like(given.scale);
  given.weights.is_float = dtype == Dtype::float32;
  given.weights.grad = slopes.const_data_ptr();
  given.weights.of_latent = static_cast<float*>(of_latent.mutable_data_ptr());
  given.weights.of_scale = static_cast<float*>(of_scale.mutable_data_ptr());
  given.run(dual::functions_for(level().name).backward);
  return {of_latent, of_scale};
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_FRAGMENT(bimos, library) {
  library.def("dual_weight(Tensor latent, Tensor scale, int group_size, bool in_steps, bool halves) -> Tensor");
  library.def("dual_weight_backward(Tensor grad, Tensor latent, Tensor scale, int group_size, bool in_steps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bimos, CPU, library) {
  library.impl("dual_weight", TORCH_BOX(&bimos::dual_weight));
  library.impl("dual_weight_backward", TORCH_BOX(&bimos::dual_weight_backward));
}
