#include "loading.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "../tiles.h"

namespace bimos {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;  // of any size: products of two are no overflow

// The tiles of a plane, made when everything is known to fit.
struct Tiling {
  const uint8_t* bits;
  const uint16_t* scales;  // of groups, or null
  int64_t out, in, block;
  uint8_t* to;
};

// Some strips of a head, likewise.
struct Strips {
  const int8_t* from;
  int64_t rows, n, first, last;
  uint8_t* to;
};

constexpr int64_t kStrips = 32;

// Takes tensors and numbers off their lists.
class Reading {
 public:
  Reading(std::vector<Tensor> tensors, std::vector<int64_t> numbers, Weights& weights)
      : tensors_(std::move(tensors)), numbers_(std::move(numbers)), held_(weights.held), arena_(weights.arena) {}

  int64_t number() {
    STD_TORCH_CHECK(number_ < numbers_.size(), "engine: too few numbers");
    return numbers_[number_++];
  }

  Tensor tensor() {
    STD_TORCH_CHECK(tensor_ < tensors_.size(), "engine: too few tensors");
    return tensors_[tensor_++];
  }

  // A copy of the next tensor, null where it is empty.
  const void* values(ScalarType type, int64_t size, const char* what) {
    const Tensor next = tensor();
    if (next.numel() == 0) return nullptr;
    STD_TORCH_CHECK(next.scalar_type() == type && next.numel() == size, "engine: ", what, " has another dtype or shape than it should");
    return copy(compact(next).const_data_ptr(), static_cast<size_t>(size) * (type == ScalarType::Half ? 2 : 4));
  }

  const float* floats(int64_t size, const char* what) { return static_cast<const float*>(values(ScalarType::Float, size, what)); }
  const uint16_t* halves(int64_t size, const char* what) { return static_cast<const uint16_t*>(values(ScalarType::Half, size, what)); }

  // `whole`: it is read whole for every token.
  Table table(int64_t rows, int64_t n, const char* what, bool whole) {
    const Tensor weight = tensor();
    STD_TORCH_CHECK(weight.numel() == rows * n, "engine: ", what, " has another shape than it should");
    held_.push_back(compact(weight));
    Table table{held_.back().const_data_ptr(), nullptr, Dtype::float32};
    if (weight.scalar_type() == ScalarType::Char) {
      if (whole && level().has_matrices) {
        uint8_t* to = arena_.take(bytes::tile_bytes(rows, n));
        for (int64_t strip = 0; strip < ceil_div(rows, bytes::kStrip); strip += kStrips)
          strips_.push_back({static_cast<const int8_t*>(table.rows), rows, n, strip, std::min(ceil_div(rows, bytes::kStrip), strip + kStrips), to});
        sources_.push_back(held_.back());
        table.rows = to;
        table.tiled = true;
      } else if (whole) {
        table.rows = copy(table.rows, static_cast<size_t>(rows * n));
      }
      if (whole) held_.pop_back();
      table.scale = floats(rows, what);
      STD_TORCH_CHECK(table.scale != nullptr, "engine: ", what, " has no scale");
      return table;
    }
    const std::optional<Dtype> dtype = dtype_of(weight);
    STD_TORCH_CHECK(dtype.has_value(), "engine: ", what, " has a dtype that it cannot read");
    table.dtype = *dtype;
    tensor();  // of the scale, empty
    return table;
  }

  Linear linear(int64_t in, int64_t out) {
    const Tensor weight = tensor();
    STD_TORCH_CHECK(weight.dim() == 3 && weight.scalar_type() == ScalarType::Byte && weight.size(1) == out && 8 * weight.size(2) == in,
                    "engine: the planes of a linear have another shape than the model's config says");
    const int64_t planes = weight.size(0), experts = number();
    STD_TORCH_CHECK(planes > 0 && planes <= 64 && experts > 0 && experts <= 65536, "engine: ", planes, " planes, ", experts, " experts");
    Linear linear{};
    linear.in = in;
    linear.out = out;
    linear.planes = planes;
    linear.experts = experts;
    linear.scale_in = halves(planes * experts * in, "scale_in");
    linear.scale_out = halves(planes * experts * out, "scale_out");
    linear.router = halves(experts * in, "router");
    STD_TORCH_CHECK(experts == 1 || linear.router != nullptr, "engine: several experts and no router");
    const Tensor groups = tensor();
    Optional scale_group;
    if (groups.numel() != 0) scale_group = groups;
    linear.grouped = scale_group.has_value();
    const int64_t group_size = number();
    STD_TORCH_CHECK(group_size >= 0 && group_size < kMost, "engine: groups of ", group_size);
    linear.block = block_of(weight, scale_group, group_size);
    STD_TORCH_CHECK(level_for(in, linear.block) == &level(), "engine: groups of ", linear.block, " inputs are too narrow for it");
    linear.tiles = tiles(weight, scale_group, linear);
    linear.offset = floats(ceil_div(in, linear.block) * out, "an offset of groups");
    STD_TORCH_CHECK(linear.offset == nullptr || linear.grouped, "engine: offsets of groups and no groups");
    const Tensor bias = tensor();
    if (bias.numel() != 0) {
      STD_TORCH_CHECK(bias.numel() == out && dtype_of(bias), "engine: a bias has another dtype or shape than it should");
      linear.bias_dtype = *dtype_of(bias);
      linear.bias = copy(compact(bias).const_data_ptr(), static_cast<size_t>(out * size_of(linear.bias_dtype)));
    }
    return linear;
  }

  // Makes all tiles, each thread those that no other has begun.
  void make(Team& team) {
    struct Work {
      const std::vector<Tiling>& all;
      const std::vector<Strips>& strips;
      std::atomic<size_t> next{0};
    } work{tilings_, strips_};
    team.run(
        [](int, void* context) {
          Work& work = *static_cast<Work*>(context);
          const size_t planes = work.all.size(), count = planes + work.strips.size();
          for (size_t i = work.next.fetch_add(1); i < count; i = work.next.fetch_add(1)) {
            if (i < planes) {
              const Tiling& one = work.all[i];
              make_tiles(level().layout, one.bits, one.scales, one.out, one.in, one.block, one.to);
            } else {
              const Strips& some = work.strips[i - planes];
              bytes::make_tiles(some.from, some.rows, some.n, some.first, some.last, some.to);
            }
          }
        },
        &work);
    sources_.clear();
  }

 private:
  const void* copy(const void* from, size_t bytes) {
    uint8_t* to = arena_.take(bytes);
    std::memcpy(to, from, bytes);
    return to;
  }

  const uint8_t* tiles(const Tensor& weight, const Optional& scale_group, const Linear& linear) {
    sources_.push_back(compact(weight));
    const auto* bits = static_cast<const uint8_t*>(sources_.back().const_data_ptr());
    const uint16_t* scales = nullptr;
    if (scale_group) {
      STD_TORCH_CHECK(scale_group->scalar_type() == ScalarType::Half, "engine: group scales are not float16");
      sources_.push_back(compact(*scale_group));
      scales = static_cast<const uint16_t*>(sources_.back().const_data_ptr());
    }
    const Plane plane{nullptr, linear.in, linear.block, linear.grouped};
    const int64_t bytes = tile_count(level().layout, linear.out) * tile_bytes(level().layout, plane);
    uint8_t* to = arena_.take(static_cast<size_t>(linear.planes * bytes));
    for (int64_t p = 0; p < linear.planes; ++p) {
      const uint16_t* own = scales == nullptr ? nullptr : scales + p * linear.out * ceil_div(linear.in, linear.block);
      tilings_.push_back({bits + p * linear.out * (linear.in / 8), own, linear.out, linear.in, linear.block, to + p * bytes});
    }
    return to;
  }

  std::vector<Tensor> tensors_;
  std::vector<int64_t> numbers_;
  std::vector<Tensor>& held_;
  Arena& arena_;
  std::vector<Tensor> sources_;  // of tiles that are to be made
  std::vector<Tiling> tilings_;
  std::vector<Strips> strips_;
  size_t tensor_ = 0, number_ = 0;
};

}  // namespace

Model load(std::vector<Tensor> tensors, std::vector<int64_t> numbers, double epsilon, double rope_scale, Team& team, Weights& weights,
           bool head_as_it_is) {
  Reading reading(std::move(tensors), std::move(numbers), weights);
  Model model{};
  Shape& shape = model.shape;
  for (int64_t* field : {&shape.vocabulary, &shape.hidden, &shape.heads, &shape.key_heads, &shape.head, &shape.inner, &shape.positions}) {
    *field = reading.number();
    STD_TORCH_CHECK(*field > 0 && *field < kMost, "engine: a size of ", *field);
  }
  STD_TORCH_CHECK(shape.heads % shape.key_heads == 0 && shape.head % 2 == 0, "engine: heads do not divide");
  shape.epsilon = static_cast<float>(epsilon);
  shape.rope_scale = static_cast<float>(rope_scale);
  const int64_t blocks = reading.number(), queries = shape.heads * shape.head, keys = shape.key_heads * shape.head;
  STD_TORCH_CHECK(queries < kMost, "engine: ", shape.heads, " heads of ", shape.head);
  model.embedding = reading.table(shape.vocabulary, shape.hidden, "the embedding", false);
  model.head = reading.table(shape.vocabulary, shape.hidden, "the head", !head_as_it_is);
  model.norm = reading.floats(shape.hidden, "the last norm");
  model.frequency = reading.floats(shape.head / 2, "the rotary embedding");
  STD_TORCH_CHECK(model.norm != nullptr && model.frequency != nullptr, "engine: a norm or the rotary embedding is missing");
  for (int64_t i = 0; i < blocks; ++i) {
    Block block{};
    block.window = reading.number();
    block.input_norm = reading.floats(shape.hidden, "a norm");
    block.inner_norm = reading.floats(shape.hidden, "a norm");
    STD_TORCH_CHECK(block.input_norm != nullptr && block.inner_norm != nullptr, "engine: a norm is missing");
    block.query_norm = reading.floats(shape.head, "a norm of queries");
    block.key_norm = reading.floats(shape.head, "a norm of keys");
    block.query = reading.linear(shape.hidden, queries);
    block.key = reading.linear(shape.hidden, keys);
    block.value = reading.linear(shape.hidden, keys);
    block.output = reading.linear(queries, shape.hidden);
    block.gate = reading.linear(shape.hidden, shape.inner);
    block.up = reading.linear(shape.hidden, shape.inner);
    block.down = reading.linear(shape.inner, shape.hidden);
    model.blocks.push_back(block);
  }
  reading.make(team);
  return model;
}

}  // namespace bimos
