// Attention, norms, gates and the loss of distillation as ops, for training (bimos/training/attention.py, fused.py, losses.py).
#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "divergence.h"
#include "flash_bf16.h"
#include "norm.h"
#include "silu.h"
#include "tensors.h"

namespace bimos {
namespace {

using flash::Heads;
using flash::Problem;

int64_t rows_worth_a_thread(int64_t n) { return std::max<int64_t>(1, (1 << 15) / n); }

struct Given {
  Problem problem{};
  bool is_float;
  int64_t batch;
  std::vector<Tensor> held;

  Given(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
    held.reserve(8);
    const std::optional<Dtype> dtype = dtype_of(query);
    STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::bfloat16, "causal_attention takes float32 or bfloat16");
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "causal_attention takes [batch, heads, tokens, n]");
    batch = query.size(0);
    is_float = dtype == Dtype::float32;
    problem.heads = query.size(1);
    problem.key_heads = key.size(1);
    problem.tokens = query.size(2);
    problem.n = query.size(3);
    problem.scale = static_cast<float>(scale);
    STD_TORCH_CHECK(problem.key_heads > 0 && problem.heads % problem.key_heads == 0, "causal_attention: ", problem.heads, " heads share ",
                    problem.key_heads);
    for (const Tensor* shared : {&key, &value}) {
      STD_TORCH_CHECK(shared->scalar_type() == query.scalar_type() && shared->size(0) == batch && shared->size(1) == problem.key_heads &&
                          shared->size(2) == problem.tokens && shared->size(3) == problem.n,
                      "causal_attention: keys or values do not fit the queries");
    }
    problem.query = heads(query);
    problem.key = heads(key);
    problem.value = heads(value);
  }

  Heads heads(const Tensor& tensor) {
    held.push_back(tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : compact(tensor));
    const Tensor& mine = held.back();
    return {mine.const_data_ptr(), mine.stride(0), mine.stride(1), mine.stride(2)};
  }

  // [batch, tokens, heads, n], contiguous, as heads.
  Heads turned(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == problem.tokens && tensor.size(2) == problem.heads &&
                        tensor.size(3) == problem.n && dtype_of(tensor).has_value(),
                    "causal_attention: a result or gradient of another shape");
    held.push_back(compact(tensor));
    const int64_t row = problem.heads * problem.n;
    return {held.back().const_data_ptr(), problem.tokens * row, problem.n, row};
  }

  flash::Functions functions() const { return flash::training_for(level().name, is_float); }

  void run(flash::Function function) const {
    torch::stable::parallel_for(0, batch * problem.key_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) function(problem, i / problem.key_heads, i % problem.key_heads);
    });
  }
};

// out [batch, tokens, heads, n] and lse [batch, heads, tokens] of query [batch, heads, tokens, n], key and value [batch, key heads, tokens, n].
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  Given given(query, key, value, scale);
  Problem& problem = given.problem;
  Tensor out = torch::stable::new_empty(query, std::array<int64_t, 4>{given.batch, problem.tokens, problem.heads, problem.n});
  Tensor lse = torch::stable::new_empty(query, std::array<int64_t, 3>{given.batch, problem.heads, problem.tokens}, ScalarType::Float);
  problem.out = given.turned(out);
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());
  given.run(given.functions().forward);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                            const Tensor& lse, double scale) {
  Given given(query, key, value, scale);
  Problem& problem = given.problem;
  STD_TORCH_CHECK(grad.scalar_type() == query.scalar_type() && out.scalar_type() == query.scalar_type(), "causal_attention: dtypes differ");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.numel() == given.batch * problem.heads * problem.tokens,
                  "causal_attention: lse is float32 [batch, heads, tokens]");
  problem.out = given.turned(out);
  problem.grad = given.turned(grad);
  given.held.push_back(compact(lse));
  problem.lse = static_cast<float*>(const_cast<void*>(given.held.back().const_data_ptr()));
  const std::array<int64_t, 4> of_heads{given.batch, problem.heads, problem.tokens, problem.n};
  const std::array<int64_t, 4> of_key_heads{given.batch, problem.key_heads, problem.tokens, problem.n};
  Tensor of_query = torch::stable::new_empty(query, of_heads);
  Tensor of_key = torch::stable::new_empty(query, of_key_heads), of_value = torch::stable::new_empty(query, of_key_heads);
  problem.of_query = of_query.mutable_data_ptr();
  problem.of_key = of_key.mutable_data_ptr();
  problem.of_value = of_value.mutable_data_ptr();
  given.run(given.functions().backward);
  return {of_query, of_key, of_value};
}

// value [rows] and slope (of the dtype of the logits) of student and teacher logits [rows, n]; see divergence.h.
std::tuple<Tensor, Tensor> kl_divergence(const Tensor& student, const Tensor& teacher, double temperature, double factor) {
  const std::optional<Dtype> dtype = dtype_of(student);
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::bfloat16, "kl_divergence takes float32 or bfloat16");
  STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0 && teacher.dim() == 2 && teacher.scalar_type() == student.scalar_type() &&
                      teacher.size(0) == student.size(0) && teacher.size(1) == student.size(1),
                  "kl_divergence: student and teacher have the same dtype and shape [rows, n]");
  const Tensor mine = compact(student), theirs = compact(teacher);
  Tensor slope = torch::stable::empty_like(mine);
  Tensor value = torch::stable::new_empty(student, std::array<int64_t, 1>{student.size(0)}, ScalarType::Float);
  const divergence::Logits logits{dtype == Dtype::float32, mine.const_data_ptr(), theirs.const_data_ptr(), slope.mutable_data_ptr(),
                                  static_cast<float*>(value.mutable_data_ptr()), student.size(1), static_cast<float>(temperature),
                                  static_cast<float>(factor)};
  const divergence::Function function = divergence::function_for(level().name);
  torch::stable::parallel_for(0, student.size(0), 1, [&](int64_t begin, int64_t end) { function(logits, begin, end); });
  return {value, slope};
}

struct NormGiven {
  norm::Rows rows{};
  int64_t count;
  Tensor x, weight;

  NormGiven(const Tensor& given, const Tensor& weights) : x(compact(given)), weight(compact(weights)) {
    const std::optional<Dtype> dtype = dtype_of(given);
    STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::bfloat16, "rms_norm takes float32 or bfloat16");
    STD_TORCH_CHECK(weights.dim() == 1 && weights.scalar_type() == ScalarType::Float && given.dim() > 0 && weights.size(0) > 0 &&
                        given.size(given.dim() - 1) == weights.size(0),
                    "rms_norm: the weight is float32 [n], n the last size of x");
    rows.is_float = dtype == Dtype::float32;
    rows.n = weights.size(0);
    count = given.numel() / rows.n;
    rows.x = x.const_data_ptr();
    rows.weight = static_cast<const float*>(weight.const_data_ptr());
  }
};

// y and inverse [rows] of x [..., n]; see norm.h.
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  NormGiven given(x, weight);
  Tensor out = torch::stable::empty_like(given.x), inverse = torch::stable::new_empty(weight, std::array<int64_t, 1>{given.count});
  given.rows.out = out.mutable_data_ptr();
  given.rows.inverse = static_cast<float*>(inverse.mutable_data_ptr());
  given.rows.epsilon = static_cast<float>(epsilon);
  const norm::Function function = norm::functions_for(level().name).forward;
  torch::stable::parallel_for(0, given.count, rows_worth_a_thread(given.rows.n), [&](int64_t begin, int64_t end) { function(given.rows, begin, end); });
  return {out, inverse};
}

// Gradients of x and of the weight.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& inverse) {
  NormGiven given(x, weight);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel() && inverse.scalar_type() == ScalarType::Float &&
                      inverse.numel() == given.count,
                  "rms_norm: a gradient of another dtype or shape");
  const Tensor slopes = compact(grad), factors = compact(inverse);
  Tensor of_x = torch::stable::empty_like(given.x);
  const int64_t n = given.rows.n, parts = std::clamp<int64_t>(given.count / rows_worth_a_thread(n), 1, torch::stable::get_num_threads());
  std::vector<float> sums(static_cast<size_t>(parts * n));
  given.rows.grad = slopes.const_data_ptr();
  given.rows.out = of_x.mutable_data_ptr();
  given.rows.inverse = static_cast<float*>(const_cast<void*>(factors.const_data_ptr()));  // read only
  const norm::Function function = norm::functions_for(level().name).backward;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      norm::Rows own = given.rows;
      own.of_weight = sums.data() + part * n;
      function(own, given.count * part / parts, given.count * (part + 1) / parts);
    }
  });
  Tensor of_weight = torch::stable::new_empty(weight, std::array<int64_t, 1>{n});
  auto* total = static_cast<float*>(of_weight.mutable_data_ptr());
  for (int64_t j = 0; j < n; ++j) {
    total[j] = 0;
    for (int64_t part = 0; part < parts; ++part) total[j] += sums[static_cast<size_t>(part * n + j)];
  }
  return {of_x, of_weight};
}

constexpr int64_t kValuesWorthAThread = 1 << 15;

void check_gate(const Tensor& gate, const Tensor& other) {
  const std::optional<Dtype> dtype = dtype_of(gate);
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::bfloat16, "gated_silu takes float32 or bfloat16");
  bool alike = other.scalar_type() == gate.scalar_type() && other.dim() == gate.dim();
  for (int64_t i = 0; alike && i < gate.dim(); ++i) alike = other.size(i) == gate.size(i);
  STD_TORCH_CHECK(alike, "gated_silu: dtypes or shapes differ");
}

Tensor gated_silu(const Tensor& gate, const Tensor& up) {
  check_gate(gate, up);
  const Tensor gates = compact(gate), ups = compact(up);
  Tensor out = torch::stable::empty_like(gates);
  silu::Values values{};
  values.is_float = gate.scalar_type() == ScalarType::Float;
  values.gate = gates.const_data_ptr();
  values.up = ups.const_data_ptr();
  values.out = out.mutable_data_ptr();
  const silu::Function function = silu::functions_for(level().name).forward;
  torch::stable::parallel_for(0, gate.numel(), kValuesWorthAThread, [&](int64_t begin, int64_t end) { function(values, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_silu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check_gate(gate, up);
  check_gate(gate, grad);
  const Tensor grads = compact(grad), gates = compact(gate), ups = compact(up);
  Tensor of_gate = torch::stable::empty_like(gates), of_up = torch::stable::empty_like(gates);
  const silu::Values values{gate.scalar_type() == ScalarType::Float, gates.const_data_ptr(), ups.const_data_ptr(), grads.const_data_ptr(),
                            nullptr, of_gate.mutable_data_ptr(), of_up.mutable_data_ptr()};
  const silu::Function function = silu::functions_for(level().name).backward;
  torch::stable::parallel_for(0, gate.numel(), kValuesWorthAThread, [&](int64_t begin, int64_t end) { function(values, begin, end); });
  return {of_gate, of_up};
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_FRAGMENT(bimos, library) {
  library.def("causal_attention(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor, Tensor)");
  library.def("kl_divergence(Tensor student, Tensor teacher, float temperature, float factor) -> (Tensor, Tensor)");
  library.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)");
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> (Tensor, Tensor)");
  library.def("gated_silu(Tensor gate, Tensor up) -> Tensor");
  library.def("gated_silu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  library.def(
      "causal_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, float scale) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(bimos, CPU, library) {
  library.impl("causal_attention", TORCH_BOX(&bimos::forward));
  library.impl("kl_divergence", TORCH_BOX(&bimos::kl_divergence));
  library.impl("rms_norm", TORCH_BOX(&bimos::rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&bimos::rms_norm_backward));
  library.impl("gated_silu", TORCH_BOX(&bimos::gated_silu));
  library.impl("gated_silu_backward", TORCH_BOX(&bimos::gated_silu_backward));
  library.impl("causal_attention_backward", TORCH_BOX(&bimos::backward));
}
