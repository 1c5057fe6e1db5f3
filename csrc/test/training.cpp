#include "training.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../divergence.h"
#include "../dual.h"
#include "../flash.h"
#include "../group8.h"
#include "../int16.h"
#include "../mixing.h"
#include "../norm.h"
#include "../signs.h"
#include "../silu.h"
#include "results.h"

namespace {

using Bits = std::vector<uint16_t>;  // bfloat16: the upper halves

Bits upper_halves(const Floats& values) {
  Bits halves(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, &values[i], 4);
    halves[i] = static_cast<uint16_t>(bits >> 16);
  }
  return halves;
}

Floats floats_of(const Bits& halves) {
  Floats values(halves.size());
  for (size_t i = 0; i < halves.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
    std::memcpy(&values[i], &bits, 4);
  }
  return values;
}

Results norms(int64_t n) {
  return [n](const char* level) {
    constexpr int64_t rows = 3;
    const Floats x = random_floats(rows * n, 1), grad = random_floats(rows * n, 2), weight = random_floats(n, 3);
    Floats y(x.size()), of_x(x.size()), inverse(rows), of_weight(weight.size());
    bimos::norm::Rows given{true, n, x.data(), nullptr, weight.data(), y.data(), inverse.data(), nullptr, 1e-5F};
    bimos::norm::functions_for(level).forward(given, 0, rows);
    given.grad = grad.data();
    given.out = of_x.data();
    given.of_weight = of_weight.data();
    bimos::norm::functions_for(level).backward(given, 0, rows);
    return joined({&y, &inverse, &of_x, &of_weight});
  };
}

Results gates(int64_t n) {
  return [n](const char* level) {
    const Floats gate = random_floats(n, 1, 3), up = random_floats(n, 2), grad = random_floats(n, 3);
    Floats y(gate.size()), of_gate(gate.size()), of_up(gate.size());
    const bimos::silu::Values given{true, gate.data(), up.data(), grad.data(), y.data(), of_gate.data(), of_up.data()};
    bimos::silu::functions_for(level).forward(given, 0, n);
    bimos::silu::functions_for(level).backward(given, 0, n);
    return joined({&y, &of_gate, &of_up});
  };
}

Results dual_weights(int64_t in, bool in_steps) {
  return [=](const char* level) {
    constexpr int64_t out = 3, group = 50;
    const int64_t groups = (in + group - 1) / group;
    const Floats latent = random_floats(out * in, 1), scale = random_floats(2 * out * groups, 2), grad = random_floats(out * in, 3);
    Floats weight(latent.size()), of_latent(latent.size()), of_scale(scale.size());
    const bimos::dual::Weights given{in, out, group, in_steps, true, latent.data(), scale.data(), weight.data(), grad.data(), of_latent.data(), of_scale.data()};
    bimos::dual::functions_for(level).forward(given, 0, out);
    bimos::dual::functions_for(level).backward(given, 0, out);
    return joined({&weight, &of_latent, &of_scale});
  };
}

Results divergences(int64_t n) {
  return [n](const char* level) {
    constexpr int64_t rows = 2;
    const Floats student = random_floats(rows * n, 1, 3), teacher = random_floats(rows * n, 2, 3);
    Floats slope(student.size()), value(rows);
    bimos::divergence::function_for(level)({true, student.data(), teacher.data(), slope.data(), value.data(), n, 1.5F, 2.0F}, 0, rows);
    return joined({&slope, &value});
  };
}

Results mixes(int64_t n, int64_t experts, bool routed) {
  return [=](const char* level) {
    constexpr int64_t tokens = 5;
    const Floats x = random_floats(tokens * n, 1), grad = random_floats(tokens * n, 2), scales = random_floats(experts * n, 3);
    const Floats router = random_floats(experts * n, 4, 0.3F);
    Floats gate = random_floats(tokens * experts, 5), of_gate = random_floats(tokens * experts, 6);
    Floats y(x.size()), of_x(x.size()), of_scales(scales.size()), of_router(router.size());
    bimos::mixing::Batch batch{n, true, x.data(), nullptr, y.data(), experts > 1 ? gate.data() : nullptr, nullptr,
                               scales.data(), routed ? router.data() : nullptr, nullptr, nullptr};
    const bimos::mixing::Functions functions = bimos::mixing::functions_for(level, experts);
    functions.forward(batch, 0, tokens);
    batch.grad = grad.data();
    batch.out = of_x.data();
    batch.grad_gate = experts > 1 ? of_gate.data() : nullptr;
    batch.grad_scales = of_scales.data();
    batch.grad_router = routed ? of_router.data() : nullptr;
    functions.backward(batch, 0, tokens);
    return joined({&y, &gate, &of_x, &of_gate, &of_scales, &of_router});
  };
}

Results attention(int64_t tokens, int64_t n) {
  return [=](const char* level) {
    constexpr int64_t heads = 2;  // that share keys and values
    const auto of = [&](const Floats& values) { return bimos::flash::Heads{values.data(), 0, tokens * n, n}; };
    const Floats query = random_floats(heads * tokens * n, 1), key = random_floats(tokens * n, 2), value = random_floats(tokens * n, 3);
    const Floats grad = random_floats(heads * tokens * n, 4);
    Floats out(query.size()), lse(static_cast<size_t>(heads * tokens)), of_query(query.size()), of_key(key.size()), of_value(value.size());
    const bimos::flash::Problem problem{heads, 1, tokens, n, 0.2F, of(query), of(key), of(value), of(out), of(grad),
                                        lse.data(), of_query.data(), of_key.data(), of_value.data()};
    const bimos::flash::Functions functions = bimos::flash::functions_for(level, true);
    functions.forward(problem, 0, 0);
    functions.backward(problem, 0, 0);
    return joined({&out, &lse, &of_query, &of_key, &of_value});
  };
}

Results bytes(int64_t in, int64_t out, int64_t tokens) {
  return [=](const char* level) {
    namespace group8 = bimos::group8;
    const Floats weight = random_floats(out * in, 1), wide = random_floats(tokens * in, 2), bias = random_floats(out, 3);
    const Bits x = upper_halves(wide);
    Bits y(static_cast<size_t>(tokens * out));
    const auto words = static_cast<size_t>(tokens * group8::groups_of(in) * group8::kGroup / 4 + 16);
    std::vector<uint32_t> tiles(static_cast<size_t>(group8::tiles_of(out) * group8::tile_bytes(in) / 4)), held(words);
    Floats scale(static_cast<size_t>(out)), steps(static_cast<size_t>(tokens * group8::groups_of(in)));
    for (int64_t first = 0; first < out; first += group8::kRows) {
      auto* tile = reinterpret_cast<uint8_t*>(tiles.data()) + first / group8::kRows * group8::tile_bytes(in);
      group8::pack(weight.data() + first * in, std::min(group8::kRows, out - first), in, tile, scale.data() + first);
    }
    const group8::Weights weights{reinterpret_cast<const uint8_t*>(tiles.data()), scale.data(), bias.data(), in, out};
    const group8::Values values{reinterpret_cast<uint8_t*>(held.data()), steps.data(), tokens};
    const group8::Functions functions = group8::functions_for(level);
    functions.prepare(x.data(), in, 0, tokens, values);
    for (int64_t tile = 0; tile < group8::tiles_of(out); ++tile) functions.product(weights, tile, values, 0, tokens, y.data());
    return floats_of(y);
  };
}

Results products_over_tokens(int64_t tokens, int64_t out, int64_t in) {
  return [=](const char* level) {
    namespace group8 = bimos::group8;
    const Bits left = upper_halves(random_floats(tokens * out, 1)), right = upper_halves(random_floats(tokens * in, 2));
    Bits y(static_cast<size_t>(out * in));
    const int64_t groups = group8::groups_of(tokens);
    std::vector<uint32_t> held(static_cast<size_t>(groups * group8::kGroup / 4 * group8::kColumns)), tile(static_cast<size_t>(groups * group8::kSteppedBytes / 4));
    Floats steps(static_cast<size_t>(groups * group8::kColumns));
    const group8::Block block{reinterpret_cast<uint8_t*>(held.data()), steps.data()};
    auto* bytes = reinterpret_cast<uint8_t*>(tile.data());
    const group8::Functions functions = group8::functions_for(level);
    for (int64_t row = 0; row < out; row += group8::kColumns) {
      functions.block({left.data(), tokens, out}, row, block);
      for (int64_t column = 0; column < in; column += group8::kRows) {
        functions.tile({right.data(), tokens, in}, column, bytes);
        functions.outer(bytes, groups, block, std::min(group8::kColumns, out - row), std::min(group8::kRows, in - column), y.data() + row * in + column, in);
      }
    }
    return floats_of(y);
  };
}

Results whole_numbers(int64_t inputs, bool columns) {
  return [=](const char* level) {
    namespace int16 = bimos::int16;
    constexpr int64_t rows = 4, others = 11;
    const Floats left = random_floats(rows * inputs, 1), right = random_floats(others * inputs, 2);
    const int16::Groups groups(inputs);
    std::vector<int32_t> lefts(static_cast<size_t>(groups.words(int16::kLeft))), rights(static_cast<size_t>(groups.words(int16::kRight)));
    Floats total(int16::kLeft * int16::kRight);
    const auto matrix = [&](const Floats& values, int64_t count) {
      return columns ? int16::Matrix{values.data(), inputs, 0, count, 1, count} : int16::Matrix{values.data(), inputs, 0, count, inputs, 1};
    };
    const int16::Functions functions = int16::functions_for(level);
    functions.pack(matrix(left, rows), int16::kLeft, lefts.data());
    functions.pack(matrix(right, others), int16::kRight, rights.data());
    functions.product(lefts.data(), rights.data(), groups, total.data());
    return total;
  };
}

Results signs(int64_t out, int64_t in) {
  return [=](const char* level) {
    const Floats values = random_floats(out * in, 1);
    std::vector<uint8_t> rows(static_cast<size_t>(out * in / 8)), columns(rows.size());
    bimos::sign_bits(level, values.data(), in, 0, out, rows.data());
    bimos::sign_bits_of_columns(level, values.data(), out, in, 0, in, columns.data());
    Floats all(rows.begin(), rows.end());
    all.insert(all.end(), columns.begin(), columns.end());
    return all;
  };
}

}  // namespace

double training_difference(const char* level) {
  double worst = 0;
  const auto see = [&](const Results& results) { worst = std::max(worst, difference(results, level)); };
  for (const int64_t n : {1, 17, 64, 130}) {
    see(norms(n));
    see(gates(n));
    see(divergences(n + 1));
    see(dual_weights(n, true));
    see(dual_weights(n, false));
    for (const int64_t experts : {1, 2, 4, 8}) {
      see(mixes(n, experts, false));
      if (experts > 1) see(mixes(n, experts, true));
    }
  }
  for (const int64_t tokens : {1, 65, 130}) see(attention(tokens, 64));
  for (const int64_t in : {1, 64, 100}) see(bytes(in, 50, 7));
  for (const int64_t tokens : {1, 64, 130}) see(products_over_tokens(tokens, 19, 50));
  for (const int64_t inputs : {1, 7, 130, 576}) {
    see(whole_numbers(inputs, false));
    see(whole_numbers(inputs, true));
  }
  see(signs(16, 40));
  return worst;
}
