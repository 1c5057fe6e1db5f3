// The engine as ops: `bimos/engine/engine.py` is their only caller.
#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "../int4.h"
#include "../tensors.h"
#include "loading.h"
#include "model.h"
#include "sampler.h"

namespace bimos {
namespace {

struct Told {
  std::unique_ptr<Sequence> sequence;
  std::vector<int64_t> ids;
};

struct Engine {
  Weights weights;
  std::unique_ptr<Team> team;
  std::unique_ptr<Reader> reader;
  std::map<int64_t, Told> sequences;
  int64_t next = 0;
  std::vector<float> logits;  // of a step, kept from one to the next
  std::mutex lock;
};

std::mutex engines_lock;
std::map<int64_t, std::shared_ptr<Engine>> engines;
int64_t next_engine = 0;

std::shared_ptr<Engine> find(int64_t id) {
  const std::lock_guard<std::mutex> guard(engines_lock);
  const auto found = engines.find(id);
  STD_TORCH_CHECK(found != engines.end(), "no engine ", id);
  STD_TORCH_CHECK(found->second->reader->team().alive(), "an engine does not work in a process forked from the one that made it; make another");
  return found->second;
}

Told& sequence_of(Engine& engine, int64_t id) {
  const auto found = engine.sequences.find(id);
  STD_TORCH_CHECK(found != engine.sequences.end(), "no sequence ", id);
  return found->second;
}

// The head is `replaced` where `engine_head` is to follow: then it need not be brought near.
int64_t engine_new(std::vector<Tensor> tensors, std::vector<int64_t> numbers, double epsilon, double rope_scale, int64_t threads,
                   int64_t cache_bits, bool int8, bool replaced) {
  STD_TORCH_CHECK(threads >= 1 && threads <= 1024, "engine: ", threads, " threads");
  STD_TORCH_CHECK(cache_bits == 16 || cache_bits == 8, "engine: a cache of ", cache_bits, " bits");
  auto engine = std::make_shared<Engine>();
  engine->team = std::make_unique<Team>(static_cast<int>(threads));
  Model model = load(std::move(tensors), std::move(numbers), epsilon, rope_scale, *engine->team, engine->weights, replaced);
  model.cache_bits = cache_bits;
  for (Block& block : model.blocks)
    for (Linear* linear : {&block.query, &block.key, &block.value, &block.output, &block.gate, &block.up, &block.down}) linear->int8 = int8;
  engine->reader = std::make_unique<Reader>(std::move(model), *engine->team);
  const std::lock_guard<std::mutex> guard(engines_lock);
  engines[next_engine] = std::move(engine);
  return next_engine++;
}

void engine_free(int64_t id) {
  std::shared_ptr<Engine> last;  // ends outside the lock
  const std::lock_guard<std::mutex> guard(engines_lock);
  const auto found = engines.find(id);
  if (found == engines.end()) return;
  last = std::move(found->second);
  engines.erase(found);
}

int64_t engine_open(int64_t id) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  const Model& model = engine->reader->model();
  engine->sequences[engine->next].sequence = std::make_unique<Sequence>(model.shape, static_cast<int64_t>(model.blocks.size()), model.cache_bits);
  return engine->next++;
}

void engine_close(int64_t id, int64_t sequence) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  engine->sequences.erase(sequence);
}

// Takes over the first `length` tokens of another sequence, or forgets what comes after them in its own.
void engine_keep(int64_t id, int64_t sequence, int64_t from, int64_t length) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  Told &told = sequence_of(*engine, sequence), &source = sequence_of(*engine, from);
  STD_TORCH_CHECK(length >= 0 && length <= source.sequence->length(), "engine: the sequence has ", source.sequence->length(), " tokens");
  if (sequence == from) {
    told.sequence->keep(length);
  } else {
    told.sequence->copy_from(*source.sequence, length);
    told.ids = source.ids;
  }
  told.ids.resize(static_cast<size_t>(length));
}

// Reads ids[i] into sequences[i]; logits where `wanted`, a row of the vocabulary each.
void read(Engine& engine, const std::vector<int64_t>& ids, const std::vector<int64_t>& sequences, const std::vector<float*>& logits) {
  const Shape& shape = engine.reader->model().shape;
  STD_TORCH_CHECK(ids.size() == sequences.size(), "engine: ", ids.size(), " tokens for ", sequences.size(), " sequences");
  std::map<int64_t, int64_t> lengths;
  for (size_t i = 0; i < ids.size(); ++i) {  // nothing is read unless everything can be
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < shape.vocabulary, "engine: token ", ids[i], " is not in the vocabulary");
    const auto place = lengths.try_emplace(sequences[i], sequence_of(engine, sequences[i]).sequence->length()).first;
    STD_TORCH_CHECK(++place->second <= shape.positions, "engine: the model has ", shape.positions, " positions");
  }
  for (const auto& [sequence, length] : lengths) sequence_of(engine, sequence).sequence->reserve(length);
  for (size_t start = 0; start < ids.size(); start += kChunk) {
    std::vector<Token> tokens;
    std::map<int64_t, int64_t> positions;
    for (size_t i = start; i < std::min(ids.size(), start + kChunk); ++i) {
      Told& told = sequence_of(engine, sequences[i]);
      const auto place = positions.try_emplace(sequences[i], told.sequence->length()).first;
      tokens.push_back({ids[i], told.sequence.get(), place->second++, logits[i]});
    }
    engine.reader->read(tokens);
    for (size_t i = start; i < start + tokens.size(); ++i) sequence_of(engine, sequences[i]).ids.push_back(ids[i]);
  }
}

// Logits of no token, of the last one of each sequence, or of every one: 0, 1, 2.
enum Wanted : int64_t { kNone, kLast, kEvery };

Tensor engine_read(int64_t id, std::vector<int64_t> ids, std::vector<int64_t> sequences, int64_t logits_of) {
  STD_TORCH_CHECK(logits_of >= kNone && logits_of <= kEvery, "engine: logits of ", logits_of);
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  const int64_t vocabulary = engine->reader->model().shape.vocabulary;
  std::vector<bool> wanted(ids.size(), logits_of == kEvery);
  std::map<int64_t, size_t> last;
  for (size_t i = 0; i < std::min(ids.size(), sequences.size()); ++i) last[sequences[i]] = i;
  for (const auto& [sequence, i] : last) wanted[i] = logits_of != kNone;
  const auto count = static_cast<int64_t>(std::count(wanted.begin(), wanted.end(), true));
  const std::array<int64_t, 2> size{count, vocabulary};
  Tensor result = torch::stable::empty({size.data(), size.size()}, ScalarType::Float);
  auto* row = static_cast<float*>(result.mutable_data_ptr());
  std::vector<float*> logits(ids.size(), nullptr);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!wanted[i]) continue;
    logits[i] = row;
    row += vocabulary;
  }
  read(*engine, ids, sequences, logits);
  return result;
}

// Reads a token into each sequence and picks the next one of each.
std::vector<int64_t> engine_next(int64_t id, std::vector<int64_t> ids, std::vector<int64_t> sequences, std::vector<double> options, int64_t top_k,
                                 std::vector<int64_t> seeds) {
  STD_TORCH_CHECK(options.size() == 4 && seeds.size() == ids.size(), "engine: options or seeds are missing");
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  const int64_t vocabulary = engine->reader->model().shape.vocabulary;
  Sampling sampling{static_cast<float>(options[0]), top_k, static_cast<float>(options[1]), static_cast<float>(options[2]),
                    static_cast<float>(options[3])};
  std::vector<float>& values = engine->logits;
  if (values.size() < ids.size() * static_cast<size_t>(vocabulary)) values.resize(ids.size() * static_cast<size_t>(vocabulary));
  std::vector<float*> logits;
  for (size_t i = 0; i < ids.size(); ++i) logits.push_back(values.data() + i * static_cast<size_t>(vocabulary));
  read(*engine, ids, sequences, logits);
  std::vector<int64_t> picked;
  for (size_t i = 0; i < ids.size(); ++i) {
    const Told& told = sequence_of(*engine, sequences[i]);
    const double random = uniform(static_cast<uint64_t>(seeds[i]), told.ids.size());
    picked.push_back(pick(logits[i], vocabulary, sampling, told.ids, random));
  }
  return picked;
}

// The mean square of each of the head's inputs over a text, but for its first token; float32 [hidden].
Tensor engine_squares(int64_t id, std::vector<int64_t> ids) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  const Model& model = engine->reader->model();
  const auto count = static_cast<int64_t>(ids.size()), hidden = model.shape.hidden;
  STD_TORCH_CHECK(count > 1 && count <= std::min(kChunk, model.shape.positions), "engine: too few or too many tokens");
  Sequence sequence(model.shape, static_cast<int64_t>(model.blocks.size()), model.cache_bits);
  sequence.reserve(count);
  std::vector<Token> tokens;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t token = ids[static_cast<size_t>(t)];
    STD_TORCH_CHECK(token >= 0 && token < model.shape.vocabulary, "engine: token ", token, " is not in the vocabulary");
    tokens.push_back({token, &sequence, t, nullptr});
  }
  engine->reader->read(tokens);
  Tensor result = torch::stable::empty({&hidden, 1}, ScalarType::Float);
  auto* squares = static_cast<float*>(result.mutable_data_ptr());
  std::fill_n(squares, hidden, 0.0F);
  std::vector<float> values(static_cast<size_t>(hidden));
  for (int64_t t = 1; t < count; ++t) {
    engine->reader->head_input(t, values.data());
    for (int64_t j = 0; j < hidden; ++j) squares[j] += values[static_cast<size_t>(j)] * values[static_cast<size_t>(j)] / static_cast<float>(count - 1);
  }
  return result;
}

// Takes another head: tiles of 4 bits (int4.h) and a float32 scale for each of their rows.
void engine_head(int64_t id, const Tensor& tiles, const Tensor& scale) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  const Shape& shape = engine->reader->model().shape;
  const int64_t size = int4_tiles(shape.vocabulary) * int4_tile_bytes(shape.hidden);
  STD_TORCH_CHECK(tiles.scalar_type() == ScalarType::Byte && tiles.numel() == size, "engine: the tiles are not those of its head");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.numel() == shape.vocabulary, "engine: a head's scales are float32, one a row");
  const Tensor rows = compact(tiles);
  engine->weights.held.push_back(compact(scale));
  uint8_t* near = engine->weights.arena.take(static_cast<size_t>(size));
  std::memcpy(near, rows.const_data_ptr(), static_cast<size_t>(size));
  engine->reader->set_head({near, static_cast<const float*>(engine->weights.held.back().const_data_ptr()), Dtype::float32, true});
}

// Seconds by part (spent.h) since the last call, of calls after one that asked for them.
std::vector<double> engine_spent(int64_t id, bool go_on) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  const auto& seconds = engine->reader->counted().seconds;
  std::vector<double> result(seconds.begin(), seconds.end());
  engine->reader->count(go_on);
  return result;
}

std::vector<int64_t> engine_tokens(int64_t id, int64_t sequence) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  return sequence_of(*engine, sequence).ids;
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_FRAGMENT(bimos, library) {
  library.def("engine_new(Tensor[] tensors, int[] numbers, float epsilon, float rope_scale, int threads, int cache_bits=16, bool int8=False, bool replaced=False) -> int");
  library.def("engine_free(int engine) -> ()");
  library.def("engine_open(int engine) -> int");
  library.def("engine_close(int engine, int sequence) -> ()");
  library.def("engine_keep(int engine, int sequence, int source, int length) -> ()");
  library.def("engine_read(int engine, int[] ids, int[] sequences, int logits_of) -> Tensor");
  library.def("engine_next(int engine, int[] ids, int[] sequences, float[] options, int top_k, int[] seeds) -> int[]");
  library.def("engine_squares(int engine, int[] ids) -> Tensor");
  library.def("engine_head(int engine, Tensor tiles, Tensor scale) -> ()");
  library.def("engine_tokens(int engine, int sequence) -> int[]");
  library.def("engine_spent(int engine, bool go_on) -> float[]");
}

STABLE_TORCH_LIBRARY_IMPL(bimos, CompositeExplicitAutograd, library) {
  library.impl("engine_new", TORCH_BOX(&bimos::engine_new));
  library.impl("engine_free", TORCH_BOX(&bimos::engine_free));
  library.impl("engine_open", TORCH_BOX(&bimos::engine_open));
  library.impl("engine_close", TORCH_BOX(&bimos::engine_close));
  library.impl("engine_keep", TORCH_BOX(&bimos::engine_keep));
  library.impl("engine_read", TORCH_BOX(&bimos::engine_read));
  library.impl("engine_next", TORCH_BOX(&bimos::engine_next));
  library.impl("engine_squares", TORCH_BOX(&bimos::engine_squares));
  library.impl("engine_head", TORCH_BOX(&bimos::engine_head));
  library.impl("engine_tokens", TORCH_BOX(&bimos::engine_tokens));
  library.impl("engine_spent", TORCH_BOX(&bimos::engine_spent));
}
