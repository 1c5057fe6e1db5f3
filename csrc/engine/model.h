// A model of the Llama family in packed form, and the cache of what it has read.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../bytes.h"
#include "../int4.h"
#include "../linear.h"
#include "../spent.h"
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

// Rows of the embedding and of the head: int8, perhaps in tiles (bytes.h), or tiles of 4 bits (int4.h), with a scale each; or any dtype without.
struct Table {
  const void* rows;
  const float* scale;  // null unless the rows are int8 or of 4 bits
  Dtype dtype;
  bool four_bits = false, tiled = false;

  int64_t tile_rows() const { return four_bits ? kTileRows : tiled ? bytes::kStrip : 1; }
  int64_t tokens() const { return tiled ? bytes::kMost : kTokens; }  // at a time
};

// y[t][r - first] = rows r in [first, last) of a table times x[t], `stride` values from one to the next, t < count <= table.tokens(). `first` begins a
// tile.
void table_rows(const Level& level, const maths::Maths& maths, const Table& table, int64_t n, int64_t first, int64_t last,
                const float* x, int64_t stride, int64_t count, float* const* y);

struct Model {
  Shape shape;
  std::vector<Block> blocks;
  const float* norm;       // the last one
  const float* frequency;  // [head / 2], of the rotary embedding
  Table embedding, head;
  int64_t cache_bits;  // of keys and values: 16 (bfloat16) or 8
};

// Keys and values of one sequence, bfloat16 or (8 bits) int8 [block, key head, position, head].
class Sequence {
 public:
  Sequence(const Shape& shape, int64_t blocks, int64_t bits);

  int64_t length() const { return length_; }
  void keep(int64_t length);                           // forgets what comes after
  void reserve(int64_t length);                        // room for so many positions
  void extend(int64_t length) { length_ = length; }
  void copy_from(const Sequence& other, int64_t length);  // a shared beginning

  maths::Cache keys(int64_t block, int64_t head) { return cache(keys_, block * key_heads_ + head); }
  maths::Cache values(int64_t block, int64_t head) { return cache(values_, block * key_heads_ + head); }

 private:
  struct Store {
    std::vector<uint8_t> data;
    std::vector<float> scale;  // of every position of every head where values are int8
  };

  Store empty(int64_t room) const;
  void copy(const Store& from, int64_t from_room, Store& to, int64_t to_room, int64_t length) const;
  maths::Cache cache(Store& store, int64_t head) const;

  int64_t heads_, key_heads_, head_size_, width_, room_ = 0, length_ = 0;  // heads of all blocks; bytes of a value
  Store keys_, values_;
};

constexpr int64_t kChunk = 128;  // tokens that go through the blocks together, at most

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
  void set_head(const Table& head) { model_.head = head; }
  Team& team() { return team_; }

  // Reads tokens, those of one sequence in order of position and with none left out; room must be reserved. Positions of a
  // sequence count as read afterwards.
  void read(const std::vector<Token>& tokens);

  // Counts the time of the caller's thread by part from now on, or no longer; what was counted so far starts anew.
  void count(bool on) {
    is_counting_ = on;
    spent_ = {};
  }
  const Spent& counted() const { return spent_; }

  // What the head multiplies for token t of those last read: the last norm's output.
  void head_input(int64_t t, float* y) const;

 private:
  struct Work;
  static void rank_main(int rank, void* context);
  void block(Work& work, const Block& block, int64_t index, int rank);
  void logits(Work& work, int rank);

  Model model_;
  const Level& level_;  // that the tiles were made for
  Team& team_;
  bool is_counting_ = false;
  Spent spent_;
  std::vector<float> x_, query_, key_, value_, mixed_, inner_, other_, part_, cosine_, sine_;
};

}  // namespace bimos
