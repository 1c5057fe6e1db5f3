// A model out of tensors: checked, and in the order in which products read it.
#pragma once

#include <vector>

#include "../tensors.h"
#include "../memory.h"
#include "model.h"

namespace bimos {

// What a model points into.
struct Weights {
  std::vector<Tensor> held;
  Arena arena;
};

// Tensors and numbers are in the order in which bimos/engine/weights.py puts them; `weights` must live as long as the model. Tensors may be
// views of a mapped file: what every token needs is copied, but for the head where it is wanted `head_as_it_is`.
Model load(std::vector<Tensor> tensors, std::vector<int64_t> numbers, double epsilon, double rope_scale, Team& team, Weights& weights,
           bool head_as_it_is);

}  // namespace bimos
