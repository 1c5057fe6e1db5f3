// What the ops of all files do with tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "linear.h"

namespace bimos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

std::optional<Dtype> dtype_of(const Tensor& tensor);

// The tensor itself where it is contiguous: asking torch costs more than a small product.
Tensor compact(const Tensor& tensor);

// Inputs of a block: those of a group where there are groups. `group_size` 0: their number divides the inputs.
int64_t block_of(const Tensor& weight, const Optional& scale_group, int64_t group_size);

// The level in use, or the one below it where groups are too narrow for its steps; null where they fit none.
const Level* level_for(int64_t in, int64_t block);

// Planes uint8 [planes, out, in/8] and group scales float16 [planes, out, groups] in the layout of `level_for`; empty without one.
Tensor tile(const Tensor& weight, const Optional& scale_group, int64_t group_size);

// Calls an op of Python's: arguments on the stack, results there afterwards. What it raises is raised here.
void call(const char* op, StableIValue* stack);

}  // namespace bimos
