// A model of the Llama family in packed form, and the cache of what it has read.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../linear.h"
#include "maths.h"
#include "team.h"

namespace bimos {

struct Shape {
  int64_t vocabulary, hidden, heads, key_heads, head, inner, positions;  // `head`: values of one head; `inner`: of the MLP
  float epsilon;       // of the norms
  float rope_scale;    // attention scaling of the rotary embedding
};

struct Block {
  Linear query, key, value, output, gate, up, down;
  const float *input_norm, *inner_norm;
  const float *query_norm, *key_norm;  // of every head (Qwen3), or null
  int64_t window;                      // positions that are seen, the token's own included; 0: all
};

// Rows of the embedding and of the head: int8 with a scale each, or any dtype without.
struct Table {
  const void* rows;
  const float* scale;  // null unless the rows are int8
  Dtype dtype;
};

struct Model {
  Shape shape;
  std::vector<Block> blocks;
  const float* norm;       // the last one
  const float* frequency;  // [head / 2], of the rotary embedding
  Table embedding, head;
};

// Keys and values of one sequence, bfloat16 [block, key head, position, head].
class Sequence {
 public:
  Sequence(const Shape& shape, int64_t blocks);

  int64_t length() const { return length_; }
  void keep(int64_t length);                           // forgets what comes after
  void reserve(int64_t length);                        // room for so many positions
  void extend(int64_t length) { length_ = length; }
  void copy_from(const Sequence& other, int64_t length);  // a shared beginning

  uint16_t* keys(int64_t block, int64_t head) { return keys_.data() + at(block, head); }
  uint16_t* values(int64_t block, int64_t head) { return values_.data() + at(block, head); }
  int64_t bytes() const { return static_cast<int64_t>(keys_.size() + values_.size()) * 2; }

 private:
  int64_t at(int64_t block, int64_t head) const { return (block * key_heads_ + head) * room_ * head_size_; }

  int64_t blocks_, key_heads_, head_size_, room_ = 0, length_ = 0;
  std::vector<uint16_t> keys_, values_;
};

// One token to read: its sequence, its position there, and where its logits go (null: nobody asks for them).
struct Token {
  int64_t id;
  Sequence* sequence;
  int64_t position;
  float* logits;
};

class Reader {
 public:
  Reader(Model model, Team& team);  // which outlives it

  const Model& model() const { return model_; }
  Team& team() { return team_; }

  // Reads tokens, those of one sequence in order of position and with none left out; room must be reserved. Positions of a
  // sequence count as read afterwards.
  void read(const std::vector<Token>& tokens);

 private:
  struct Work;
  static void rank_main(int rank, void* context);
  void block(Work& work, const Block& block, int64_t index, int rank);
  void logits(Work& work, int rank);

  Model model_;
  const Level& level_;  // that the tiles were made for
  Team& team_;
  std::vector<float> x_, query_, key_, value_, mixed_, inner_, other_, part_, cosine_, sine_;
};

}  // namespace bimos
