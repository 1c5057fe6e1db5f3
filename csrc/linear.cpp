#include "linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "matrices.h"
#include "spent.h"
#include "tiles.h"

namespace bimos {
namespace {

// Below this many weights times tokens a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 18;
// With more tokens than this for each thread, threads share out the tokens, and no table is made twice.
constexpr int64_t kManyTokens = 2 * kTokens;  // by tables; by the matrix unit, that a tile is full

// What one thread needs for the tokens that it takes at a time; grows, and is kept from call to call.
struct Scratch {
  std::vector<float> x, y, scaled, product, gate, scales;
  std::vector<uint8_t> tables;
};

Scratch& scratch() {
  thread_local Scratch mine;
  return mine;
}

template <typename T>
T* at_least(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}

void softmax(float* logits, int64_t count) {
  float most = logits[0], sum = 0;
  for (int64_t e = 1; e < count; ++e) most = std::max(most, logits[e]);
  for (int64_t e = 0; e < count; ++e) sum += logits[e] = std::exp(logits[e] - most);
  for (int64_t e = 0; e < count; ++e) logits[e] /= sum;
}

void add_offsets(const Linear& linear, const float* x, int64_t row, int64_t rows, float* y) {
  for (int64_t group = 0; group * linear.block < linear.in; ++group) {
    const int64_t end = std::min(linear.in, (group + 1) * linear.block);
    float sums[8] = {};  // in parallel: less rounding, and room for the compiler
    for (int64_t j = group * linear.block; j < end; ++j) sums[j % 8] += x[j];
    const float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    const float* offset = linear.offset + group * linear.out + row;
    for (int64_t r = 0; r < rows; ++r) y[r] += sum * offset[r];
  }
}

struct Job {
  const Level& level;
  const Linear& linear;
  const char* x;
  char* y;
  Dtype dtype;
  int64_t tokens, tiles, parts;
  bool by_tokens;
};

// Rows of tiles [first, last) of `count` tokens from `token` on.
void some(const Job& job, int64_t token, int64_t count, int64_t first, int64_t last) {
  const int64_t in = job.linear.in, out = job.linear.out, padded = padded_inputs(in), size = size_of(job.dtype);
  const int64_t tile_rows = rows_of(job.level.layout), stride = job.tiles * tile_rows;
  const int64_t row = first * tile_rows, rows = std::min(out, last * tile_rows) - row;
  float* x = at_least(scratch().x, count * padded);
  float* y = at_least(scratch().y, count * stride);
  for (int64_t t = 0; t < count; ++t) {
    job.level.load(job.x + (token + t) * in * size, job.dtype, in, x + t * padded);
    std::fill(x + t * padded + in, x + (t + 1) * padded, 0.0F);
  }
  rows_of_linear(job.level, job.linear, x, padded, count, first, last, y, stride);
  for (int64_t t = 0; t < count; ++t) job.level.store(y + t * stride + row, job.dtype, rows, job.y + ((token + t) * out + row) * size);
}

void part(int64_t index, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  const int64_t units = job.by_tokens ? job.tokens : job.tiles;
  const int64_t begin = units * index / job.parts, end = units * (index + 1) / job.parts;
  if (begin == end) return;
  const int64_t token = job.by_tokens ? begin : 0, tokens = job.by_tokens ? end : job.tokens;
  const int64_t first = job.by_tokens ? 0 : begin, last = job.by_tokens ? job.tiles : end;
  for (int64_t t = token, count = 0; t < tokens; t += count) {
    count = tokens_at_a_time(job.level, job.linear, tokens - t);
    some(job, t, count, first, last);
  }
}

struct Int8Job {
  const Level& level;
  const int8_t* weight;
  const float *scale, *bias;
  const uint8_t* prepared;  // `bytes` a token
  int64_t bytes;
  char* y;
  Dtype dtype;
  int64_t in, out, tokens, parts;
};

void int8_part(int64_t index, void* context) {
  const Int8Job& job = *static_cast<const Int8Job*>(context);
  constexpr int64_t kRows = 32;  // whose weights stay in the first cache for all tokens
  float sums[kTokens][kRows];
  const int64_t begin = job.out * index / job.parts, end = job.out * (index + 1) / job.parts;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = std::min(kRows, end - row);
    for (int64_t token = 0; token < job.tokens; token += kTokens) {
      const int count = static_cast<int>(std::min<int64_t>(kTokens, job.tokens - token));
      const uint8_t* x[kTokens];
      float* y[kTokens];
      for (int t = 0; t < count; ++t) {
        x[t] = job.prepared + (token + t) * job.bytes;
        y[t] = sums[t];
      }
      job.level.rows.int8(job.weight + row * job.in, rows, job.in, x, count, y);
      for (int t = 0; t < count; ++t) {
        for (int64_t r = 0; r < rows; ++r) sums[t][r] = job.scale[row + r] * sums[t][r] + (job.bias == nullptr ? 0.0F : job.bias[row + r]);
        job.level.store(sums[t], job.dtype, rows, job.y + ((token + t) * job.out + row) * size_of(job.dtype));
      }
    }
  }
}

static_assert(matrices::kFewest > kTokens && matrices::kFewestInt8 > kTokens);  // fewer are known to go by tables

// Whether so many tokens are taken together by the matrix unit.
bool worth_matrices(const Level& level, const Linear& linear, int64_t tokens) {
  return level.has_matrices && tokens >= (linear.int8 ? matrices::kFewestInt8 : matrices::kFewest);
}

}  // namespace

int64_t tokens_at_a_time(const Level& level, const Linear& linear, int64_t tokens) {
  return std::min<int64_t>(worth_matrices(level, linear, tokens) ? matrices::most_tokens(linear.in) : kTokens, tokens);
}

namespace {

struct Inputs {
  const float* x;
  int64_t stride;
};

// The product of a plane with `count` tokens, by tables or by matrices, which know what to do with `mixed`; `input(t, some, spare)` is what `some` tokens are multiplied as.
template <typename Input>
void product_of_plane(const Level& level, const Plane& plane, int64_t count, Input input, int64_t first, int64_t last, const matrices::Mixed* mixed,
                      float* y, int64_t stride) {
  Scratch& mine = scratch();
  const bool by_matrices = count > kTokens;
  const int64_t padded = padded_inputs(plane.in), step = by_matrices ? matrices::kTile : 1;
  const auto bytes = static_cast<int64_t>(by_matrices ? matrices::tile_bytes(plane) : level.table_bytes(plane.in));
  const auto floats = by_matrices ? static_cast<int64_t>(matrices::tile_floats(plane)) : ceil_div(plane.in, plane.block);
  float* scaled = at_least(mine.scaled, step * padded);
  float* scales = at_least(mine.scales, ceil_div(count, step) * floats);
  uint8_t* tables = at_least(mine.tables, ceil_div(count, step) * bytes + 64);
  tables += (64 - reinterpret_cast<uintptr_t>(tables) % 64) % 64;
  if (by_matrices) {
    for (int64_t t = 0; t < count; t += step) {
      const int64_t few = std::min(step, count - t);
      const Inputs from = input(t, few, scaled);
      matrices::prepare(from.x, from.stride, few, count, plane, tables + t / step * bytes, scales + t / step * floats);
      mark(Part::tables);
    }
    matrices::product(plane, first, last, tables, scales, count, mixed, y, stride);
  } else {
    const uint8_t* each_table[kTokens];
    const float* each_scale[kTokens];
    std::fill(scaled + plane.in, scaled + padded, 0.0F);
    for (int64_t t = 0; t < count; ++t) {
      each_table[t] = tables + t * bytes;
      each_scale[t] = scales + t * floats;
      level.build(input(t, 1, scaled).x, plane, tables + t * bytes, scales + t * floats);
      mark(Part::tables);
    }
    level.product(plane, first, last, each_table, each_scale, static_cast<int>(count), y, stride);
  }
  mark(Part::products);
}

}  // namespace

void rows_of_linear(const Level& level, const Linear& linear, const float* x, int64_t x_stride, int64_t count, int64_t first, int64_t last,
                    float* y, int64_t y_stride) {
  Scratch& mine = scratch();
  const int64_t in = linear.in, experts = linear.experts;
  const int64_t tile_rows = rows_of(level.layout), tiles = tile_count(level.layout, linear.out), stride = tiles * tile_rows;
  const int64_t row = first * tile_rows, rows = std::min(linear.out, last * tile_rows) - row;
  // One plane and nothing to add it to, in whole tiles: the product is made where the result is to be.
  const bool is_alone = linear.planes == 1 && linear.bias == nullptr && linear.offset == nullptr && linear.out % tile_rows == 0;
  float* product = is_alone ? y : at_least(mine.product, count * stride);
  const int64_t product_stride = is_alone ? y_stride : stride;
  float* gates = at_least(mine.gate, count * experts);
  const bool by_matrices = count > kTokens;
  if (linear.router == nullptr) {
    std::fill_n(gates, count * experts, 1.0F);
  } else {
    if (by_matrices) matrices::dots(x, x_stride, count, linear.router, experts, in, gates);
    for (int64_t t = 0; t < count; ++t) {
      if (!by_matrices) level.dots(x + t * x_stride, linear.router, experts, in, gates + t * experts);
      softmax(gates + t * experts, experts);
    }
  }
  for (int64_t t = 0; t < count && !is_alone; ++t) {
    if (linear.bias == nullptr) {
      std::fill_n(y + t * y_stride + row, rows, 0.0F);
    } else {
      level.load(static_cast<const char*>(linear.bias) + row * size_of(linear.bias_dtype), linear.bias_dtype, rows, y + t * y_stride + row);
    }
    if (linear.offset != nullptr) add_offsets(linear, x + t * x_stride, row, rows, y + t * y_stride + row);
  }
  mark(Part::router);
  for (int64_t p = 0; p < linear.planes; ++p) {
    Plane plane{nullptr, in, linear.block, linear.grouped, linear.int8};
    plane.data = linear.tiles + p * tiles * tile_bytes(level.layout, plane);
    const auto mix = [&](const float* from, int64_t from_stride, int64_t t, int64_t some, const uint16_t* scale, int64_t stride_of_scale, int64_t n,
                         float* to, int64_t to_stride) {
      if (by_matrices) return matrices::mix(from, from_stride, gates + t * experts, some, scale, experts, stride_of_scale, n, to, to_stride);
      for (int64_t i = 0; i < some; ++i)
        level.mix(from + i * from_stride, gates + (t + i) * experts, scale, experts, stride_of_scale, n, to + i * to_stride);
    };
    const auto input = [&](int64_t t, int64_t some, float* spare) -> Inputs {
      if (linear.scale_in == nullptr) return {x + t * x_stride, x_stride};
      mix(x + t * x_stride, x_stride, t, some, linear.scale_in + p * experts * in, in, in, spare, padded_inputs(in));
      mark(Part::scales);
      return {spare, padded_inputs(in)};
    };
    const uint16_t* scale_out = linear.scale_out == nullptr ? nullptr : linear.scale_out + p * experts * linear.out;
    const matrices::Mixed mixed{gates, scale_out, experts, linear.out};
    const bool is_within = by_matrices && scale_out != nullptr && experts <= matrices::kMostMixed;
    product_of_plane(level, plane, count, input, first, last, is_within ? &mixed : nullptr, product, product_stride);
    float* part = product + row;
    if (scale_out != nullptr && !is_within) {
      mix(part, product_stride, 0, count, scale_out + row, linear.out, rows, part, product_stride);
    }
    for (int64_t t = 0; t < count && !is_alone; ++t)
      for (int64_t r = 0; r < rows; ++r) y[t * y_stride + row + r] += part[t * product_stride + r];
    mark(Part::scales);
  }
}

void apply(const Level& level, const Linear& linear, const void* x, Dtype dtype, int64_t tokens, void* y, const Pool& pool) {
  const int64_t tiles = tile_count(level.layout, linear.out);
  const int64_t worth = linear.in * linear.out * linear.planes * tokens / kWorthAThread;
  const bool by_tokens = tokens >= (level.has_matrices ? matrices::kTile : kManyTokens) * pool.size;
  const int64_t parts = std::clamp<int64_t>(worth, 1, std::min(pool.size, by_tokens ? tokens : tiles));
  Job job{level, linear, static_cast<const char*>(x), static_cast<char*>(y), dtype, tokens, tiles, parts, by_tokens};
  if (parts == 1) return part(0, &job);
  pool.run(parts, part, &job);
}

void apply_int8(const Level& level, const int8_t* weight, const float* scale, const float* bias, int64_t in, int64_t out, const void* x,
                Dtype dtype, int64_t tokens, void* y, const Pool& pool) {
  const auto bytes = static_cast<int64_t>(level.rows.int8_bytes(in));
  float* values = at_least(scratch().x, in);
  uint8_t* prepared = at_least(scratch().tables, tokens * bytes + 64);
  prepared += (64 - reinterpret_cast<uintptr_t>(prepared) % 64) % 64;
  for (int64_t t = 0; t < tokens; ++t) {
    level.load(static_cast<const char*>(x) + t * in * size_of(dtype), dtype, in, values);
    level.rows.int8_prepare(values, in, prepared + t * bytes);
  }
  const int64_t parts = std::clamp<int64_t>(in * out * tokens / kWorthAThread, 1, std::min(pool.size, out));
  Int8Job job{level, weight, scale, bias, prepared, bytes, static_cast<char*>(y), dtype, in, out, tokens, parts};
  if (parts == 1) return int8_part(0, &job);
  pool.run(parts, int8_part, &job);
}

}  // namespace bimos
