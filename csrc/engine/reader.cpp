// The forward pass: every rank of the team goes through all blocks; where one needs what another has made, they meet.
//
// Few tokens: ranks share out the rows of every linear, and the heads. Many tokens: ranks share out the tokens, each with all rows, so
// that no table is made twice; they meet when keys and values are in the cache, and when attention, whose blocks are shared out by what
// they cost, is done.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../flash_bf16.h"
#include "../matrices.h"
#include "../spent.h"
#include "../tiles.h"
#include "model.h"

namespace bimos {
namespace {

template <typename T>
T* at_least(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.assign(static_cast<size_t>(count), T{});
  return buffer.data();
}

struct Range {
  int64_t begin, end;
};

Range share(int64_t count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

int64_t tiles_of(const Level& level, const Linear& linear) { return tile_count(level.layout, linear.out); }

// One linear among several that share their input: where its result goes.
struct Target {
  const Linear* linear;
  float* y;
  int64_t stride;
};

// Tokens that follow each other in a sequence.
struct Run {
  int64_t begin, end;
};

constexpr int64_t kLongRun = 16;  // tokens from which on keys and values are worth turning

std::vector<Run> runs_of(const std::vector<Token>& tokens) {
  std::vector<Run> runs;
  for (size_t t = 0; t < tokens.size(); ++t) {
    const bool follows = t > 0 && tokens[t].sequence == tokens[t - 1].sequence && tokens[t].position == tokens[t - 1].position + 1;
    if (!follows) runs.push_back({static_cast<int64_t>(t), static_cast<int64_t>(t)});
    ++runs.back().end;
  }
  return runs;
}

}  // namespace

struct Reader::Work {
  Reader& reader;
  const Level& level;
  maths::Maths maths;
  const std::vector<Token>& tokens;
  bool by_tokens;
  std::vector<Run> runs;  // where ranks share out tokens

  int64_t count() const { return static_cast<int64_t>(tokens.size()); }
  int size() const { return reader.team_.size(); }
  Range own_tokens(int rank) const { return by_tokens ? share(count(), rank, size()) : Range{0, count()}; }
  void meet() {
    mark(Part::rest);
    reader.team_.meet();
    mark(Part::waiting);
  }
  void meet_if_rows() {
    if (!by_tokens) meet();
  }

  // This rank's rows of several linears with the same input, for its tokens.
  void linears(const float* x, int64_t x_stride, Range tokens_of_x, std::initializer_list<Target> targets, int rank) {
    int64_t all = 0;
    for (const Target& target : targets) all += tiles_of(level, *target.linear);
    const Range mine = by_tokens ? Range{0, all} : share(all, rank, size());
    int64_t before = 0;
    for (const Target& target : targets) {
      const int64_t tiles = tiles_of(level, *target.linear);
      const int64_t first = std::clamp<int64_t>(mine.begin - before, 0, tiles), last = std::clamp<int64_t>(mine.end - before, 0, tiles);
      before += tiles;
      if (first == last) continue;
      for (int64_t t = tokens_of_x.begin, few = 0; t < tokens_of_x.end; t += few) {
        few = tokens_at_a_time(level, *target.linear, tokens_of_x.end - t);
        rows_of_linear(level, *target.linear, x + (t - tokens_of_x.begin) * x_stride, x_stride, few, first, last,
                       target.y + t * target.stride, target.stride);
      }
    }
  }

  // Adds this rank's rows of what a linear gave to the stream.
  void add_to_stream(const Linear& linear, const float* part, int64_t stride, float* x, int64_t x_stride, int rank) {
    const int64_t rows = rows_of(level.layout), tiles = tiles_of(level, linear);
    const Range mine = by_tokens ? Range{0, tiles} : share(tiles, rank, size()), own = own_tokens(rank);
    const int64_t begin = mine.begin * rows, end = std::min(linear.out, mine.end * rows);
    for (int64_t t = own.begin; t < own.end && begin < end; ++t) maths.add(part + t * stride + begin, end - begin, x + t * x_stride + begin);
  }
};

Reader::Reader(Model model, Team& team) : model_(std::move(model)), level_(level()), team_(team) {}

void Reader::rank_main(int rank, void* context) {
  Work& work = *static_cast<Work*>(context);
  Reader& reader = work.reader;
  const Counting counting(rank == 0 && reader.is_counting_ ? &reader.spent_ : nullptr);
  for (size_t i = 0; i < reader.model_.blocks.size(); ++i) reader.block(work, reader.model_.blocks[i], static_cast<int64_t>(i), rank);
  if (work.by_tokens) work.meet();  // the head's rows are shared out, whoever read the token
  mark(Part::rest);
  reader.logits(work, rank);
  mark(Part::head);
}

void Reader::read(const std::vector<Token>& tokens) {
  if (tokens.empty()) return;
  const Shape& shape = model_.shape;
  const Level& used = level_;
  const auto count = static_cast<int64_t>(tokens.size());
  const int64_t hidden = padded_inputs(shape.hidden), inner = padded_inputs(shape.inner), heads = padded_inputs(shape.heads * shape.head);
  const int64_t half = shape.head / 2;
  at_least(x_, count * hidden);
  at_least(query_, count * heads);
  at_least(key_, count * shape.key_heads * shape.head);
  at_least(value_, count * shape.key_heads * shape.head);
  at_least(mixed_, count * heads);
  at_least(inner_, count * inner);
  at_least(other_, count * inner);
  at_least(part_, count * hidden);
  at_least(cosine_, count * half);
  at_least(sine_, count * half);
  for (int64_t t = 0; t < count; ++t) {
    const Token& token = tokens[static_cast<size_t>(t)];
    float* x = x_.data() + t * hidden;
    if (model_.embedding.scale != nullptr) {
      const auto* row = static_cast<const int8_t*>(model_.embedding.rows) + token.id * shape.hidden;
      const float scale = model_.embedding.scale[token.id];
      for (int64_t j = 0; j < shape.hidden; ++j) x[j] = scale * static_cast<float>(row[j]);
    } else {
      const auto* rows = static_cast<const char*>(model_.embedding.rows);
      used.load(rows + token.id * shape.hidden * size_of(model_.embedding.dtype), model_.embedding.dtype, shape.hidden, x);
    }
    for (int64_t j = 0; j < half; ++j) {
      const float angle = static_cast<float>(token.position) * model_.frequency[j];
      cosine_[static_cast<size_t>(t * half + j)] = std::cos(angle) * shape.rope_scale;
      sine_[static_cast<size_t>(t * half + j)] = std::sin(angle) * shape.rope_scale;
    }
  }
  // So many that no part of a tile, or of a pass over a table, is left empty; or as many as there ever are.
  const int64_t many = std::min((used.has_matrices ? matrices::kTile : kTokens) * team_.size(), kChunk);
  Work work{*this, used, maths::maths_for(used.name), tokens, count >= many, {}};
  if (work.by_tokens) work.runs = runs_of(tokens);
  team_.run(rank_main, &work);
  for (const Token& token : tokens) token.sequence->extend(token.position + 1);
}

void Reader::block(Work& work, const Block& block, int64_t index, int rank) {
  thread_local std::vector<float> normed_buffer, scores_buffer;
  const Shape& shape = model_.shape;
  const int64_t hidden = padded_inputs(shape.hidden), inner = padded_inputs(shape.inner), heads = padded_inputs(shape.heads * shape.head);
  const int64_t keys = shape.key_heads * shape.head, half = shape.head / 2, group = shape.heads / shape.key_heads;
  const Range own = work.own_tokens(rank);
  const int64_t mine = own.end - own.begin;
  float* normed = at_least(normed_buffer, mine * hidden);
  const auto norm = [&](const float* weight) {
    for (int64_t t = 0; t < mine; ++t) {
      work.maths.rms_norm(x_.data() + (own.begin + t) * hidden, weight, shape.hidden, shape.epsilon, normed + t * hidden);
      std::fill(normed + t * hidden + shape.hidden, normed + (t + 1) * hidden, 0.0F);  // the buffer may be another model's
    }
  };

  norm(block.input_norm);
  mark(Part::rest);
  work.linears(normed, hidden, own,
               {{&block.query, query_.data(), heads}, {&block.key, key_.data(), keys}, {&block.value, value_.data(), keys}}, rank);
  work.meet_if_rows();

  // Heads of queries, then of keys: normed where the model does so, turned to their position; keys and values to the cache.
  const Range all_heads = work.by_tokens ? Range{0, shape.heads + shape.key_heads} : share(shape.heads + shape.key_heads, rank, work.size());
  for (int64_t t = own.begin; t < own.end; ++t) {
    const Token& token = work.tokens[static_cast<size_t>(t)];
    for (int64_t h = all_heads.begin; h < all_heads.end; ++h) {
      const bool is_query = h < shape.heads;
      const int64_t which = is_query ? h : h - shape.heads;
      float* head = is_query ? query_.data() + t * heads + which * shape.head : key_.data() + t * keys + which * shape.head;
      const float* weight = is_query ? block.query_norm : block.key_norm;
      if (weight != nullptr) work.maths.rms_norm(head, weight, shape.head, shape.epsilon, head);
      work.maths.rotate(head, cosine_.data() + t * half, sine_.data() + t * half, shape.head);
      if (is_query) continue;
      work.maths.remember(head, shape.head, token.position, token.sequence->keys(index, which));
      work.maths.remember(value_.data() + t * keys + which * shape.head, shape.head, token.position, token.sequence->values(index, which));
    }
  }
  work.meet();

  const float scale = 1.0F / std::sqrt(static_cast<float>(shape.head));
  const auto seen_by = [&](const Token& token) { return block.window > 0 ? std::min(block.window, token.position + 1) : token.position + 1; };
  const auto attend = [&](int64_t t, Range queries) {
    const Token& token = work.tokens[static_cast<size_t>(t)];
    const int64_t last = token.position + 1, first = last - seen_by(token);
    float* scores = at_least(scores_buffer, maths::kHeads * (last - first + shape.head));
    for (int64_t h = queries.begin, next = 0; h < queries.end; h = next) {
      next = std::min({queries.end, (h / group + 1) * group, h + maths::kHeads});  // heads that share a head of keys
      const int64_t at = t * heads + h * shape.head;
      work.maths.attend({query_.data() + at, mixed_.data() + at, static_cast<int>(next - h), shape.head, shape.head,
                         token.sequence->keys(index, h / group), token.sequence->values(index, h / group), first, last, scale, scores});
    }
  };
  if (work.by_tokens) {
    // Later blocks of a run cost more: they are dealt out to and fro.
    int64_t dealt = 0;
    const auto is_mine = [&] {
      const int64_t place = dealt++ % (2 * work.size());
      return (place < work.size() ? place : 2 * work.size() - 1 - place) == rank;
    };
    std::vector<int64_t> mine_of_run;
    for (const Run& run : work.runs) {
      const Token& token = work.tokens[static_cast<size_t>(run.begin)];
      if (run.end - run.begin < kLongRun) {
        const bool is_own = is_mine();
        for (int64_t t = run.begin; t < run.end && is_own; ++t) attend(t, {0, shape.heads});
        continue;
      }
      mine_of_run.clear();
      for (int64_t b = 0; b < ceil_div(run.end - run.begin, flash::kBlock); ++b)
        if (is_mine()) mine_of_run.push_back(b);
      for (int64_t g = 0; g < shape.key_heads && !mine_of_run.empty(); ++g) {
        const int64_t at = run.begin * heads + g * group * shape.head;
        const flash::Prompt prompt{query_.data() + at, mixed_.data() + at, heads, group, run.end - run.begin, shape.head, token.position,
                                   block.window > 0 ? block.window : flash::kEndless, scale, token.sequence->keys(index, g),
                                   token.sequence->values(index, g)};
        flash::reading_for(work.level.name)(prompt, mine_of_run.data(), static_cast<int64_t>(mine_of_run.size()));
      }
    }
  } else {
    // Tokens' heads, one token after the other: every rank takes as many positions as the others.
    int64_t all = 0, before = 0;
    for (const Token& token : work.tokens) all += seen_by(token);
    for (int64_t t = own.begin; t < own.end; ++t) {
      const int64_t seen = seen_by(work.tokens[static_cast<size_t>(t)]);
      const auto head_at = [&](int at) { return std::clamp<int64_t>((all * shape.heads * at / work.size() - before) / seen, 0, shape.heads); };
      attend(t, {head_at(rank), head_at(rank + 1)});
      before += seen * shape.heads;
    }
  }
  mark(Part::attention);
  work.meet();

  work.linears(mixed_.data() + own.begin * heads, heads, own, {{&block.output, part_.data(), hidden}}, rank);
  work.add_to_stream(block.output, part_.data(), hidden, x_.data(), hidden, rank);
  work.meet_if_rows();

  norm(block.inner_norm);
  mark(Part::rest);
  // Gate and up have the same rows: a rank multiplies its own of both.
  const int64_t rows = rows_of(work.level.layout), tiles = tiles_of(work.level, block.gate);
  const Range part = work.by_tokens ? Range{0, tiles} : share(tiles, rank, work.size());
  const int64_t begin = part.begin * rows, end = std::min(shape.inner, part.end * rows);
  for (int64_t t = 0, few = 0; t < mine && begin < end; t += few) {
    few = std::min(tokens_at_a_time(work.level, block.gate, mine - t), tokens_at_a_time(work.level, block.up, mine - t));
    float *gate = inner_.data() + (own.begin + t) * inner, *up = other_.data() + (own.begin + t) * inner;
    rows_of_linear(work.level, block.gate, normed + t * hidden, hidden, few, part.begin, part.end, gate, inner);
    rows_of_linear(work.level, block.up, normed + t * hidden, hidden, few, part.begin, part.end, up, inner);
    for (int64_t i = 0; i < few; ++i) work.maths.swiglu(gate + i * inner + begin, up + i * inner + begin, end - begin);
    mark(Part::rest);
  }
  work.meet_if_rows();

  work.linears(inner_.data() + own.begin * inner, inner, own, {{&block.down, part_.data(), hidden}}, rank);
  work.add_to_stream(block.down, part_.data(), hidden, x_.data(), hidden, rank);
  work.meet_if_rows();
}

void Reader::head_input(int64_t t, float* y) const {
  const Shape& shape = model_.shape;
  maths::maths_for(level_.name).rms_norm(x_.data() + t * padded_inputs(shape.hidden), model_.norm, shape.hidden, shape.epsilon, y);
}

void Reader::logits(Work& work, int rank) {
  thread_local std::vector<float> normed_buffer;
  const Shape& shape = model_.shape;
  const int64_t hidden = padded_inputs(shape.hidden), unit = model_.head.tile_rows(), most = model_.head.tokens();
  const Range units = share(ceil_div(shape.vocabulary, unit), rank, work.size());
  const int64_t first = units.begin * unit, last = std::min(shape.vocabulary, units.end * unit);
  std::vector<int64_t> wanted;
  for (int64_t t = 0; t < work.count(); ++t)
    if (work.tokens[static_cast<size_t>(t)].logits != nullptr) wanted.push_back(t);
  const auto count = static_cast<int64_t>(wanted.size());
  float* normed = at_least(normed_buffer, std::min(most, count) * hidden);
  std::vector<float*> y;
  for (int64_t start = 0; start < count; start += most) {
    const int64_t few = std::min(most, count - start);
    y.clear();
    for (int64_t i = 0; i < few; ++i) {
      const int64_t t = wanted[static_cast<size_t>(start + i)];
      head_input(t, normed + i * hidden);
      y.push_back(work.tokens[static_cast<size_t>(t)].logits + first);
    }
    if (first < last) table_rows(work.level, work.maths, model_.head, shape.hidden, first, last, normed, hidden, few, y.data());
  }
}

}  // namespace bimos
