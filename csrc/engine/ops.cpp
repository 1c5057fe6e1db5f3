// The engine as ops: `bimos/engine.py` is their only caller.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "../int4.h"
#include "../tensors.h"
#include "../tiles.h"
#include "model.h"
#include "sampler.h"

namespace bimos {
namespace {

constexpr int64_t kChunk = 128;  // tokens that go through the blocks together

struct Told {
  std::unique_ptr<Sequence> sequence;
  std::vector<int64_t> ids;
};

// Memory in large pages where the system has them: a head is read whole for every token, and small pages would be looked up each time.
using Memory = std::unique_ptr<void, decltype(&std::free)>;

Memory large_pages(size_t bytes) {
  constexpr size_t kPage = size_t{1} << 21;
  const size_t size = (bytes + kPage - 1) / kPage * kPage;
  Memory memory(std::aligned_alloc(kPage, size), &std::free);
  STD_TORCH_CHECK(memory != nullptr, "engine: no memory for ", size, " bytes");
#ifdef __linux__
  madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
  return memory;
}

struct Engine {
  std::vector<Tensor> held;
  std::vector<Memory> memory;
  std::unique_ptr<Reader> reader;
  std::map<int64_t, Told> sequences;
  int64_t next = 0;
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

// Takes tensors and numbers off lists in the order in which bimos/engine.py puts them on.
class Reading {
 public:
  Reading(std::vector<Tensor> tensors, std::vector<int64_t> numbers, Engine& engine)
      : tensors_(std::move(tensors)), numbers_(std::move(numbers)), held_(engine.held), memory_(engine.memory) {}

  int64_t number() {
    STD_TORCH_CHECK(number_ < numbers_.size(), "engine: too few numbers");
    return numbers_[number_++];
  }

  Tensor tensor() {
    STD_TORCH_CHECK(tensor_ < tensors_.size(), "engine: too few tensors");
    return tensors_[tensor_++];
  }

  // The values of the next tensor, null where it is empty.
  const void* values(ScalarType type, int64_t size, const char* what) {
    const Tensor next = tensor();
    if (next.numel() == 0) return nullptr;
    STD_TORCH_CHECK(next.scalar_type() == type && next.numel() == size, "engine: ", what, " has another dtype or shape than it should");
    held_.push_back(torch::stable::contiguous(next));
    return held_.back().const_data_ptr();
  }

  const float* floats(int64_t size, const char* what) { return static_cast<const float*>(values(ScalarType::Float, size, what)); }
  const uint16_t* halves(int64_t size, const char* what) { return static_cast<const uint16_t*>(values(ScalarType::Half, size, what)); }

  Table table(int64_t rows, int64_t n, const char* what, bool copy) {
    const Tensor weight = tensor();
    STD_TORCH_CHECK(weight.numel() == rows * n, "engine: ", what, " has another shape than it should");
    held_.push_back(torch::stable::contiguous(weight));
    Table table{held_.back().const_data_ptr(), nullptr, Dtype::float32};
    if (weight.scalar_type() == ScalarType::Char) {
      if (copy) {
        memory_.push_back(large_pages(static_cast<size_t>(rows * n)));
        std::memcpy(memory_.back().get(), table.rows, static_cast<size_t>(rows * n));
        table.rows = memory_.back().get();
        held_.pop_back();
      }
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
    linear.block = block_of(weight, scale_group);
    STD_TORCH_CHECK(level_for(in, linear.block) == &level(), "engine: groups of ", linear.block, " inputs are too narrow for it");
    held_.push_back(tile(weight, scale_group));
    linear.tiles = static_cast<const uint8_t*>(held_.back().const_data_ptr());
    const Tensor bias = tensor();
    if (bias.numel() != 0) {
      STD_TORCH_CHECK(bias.numel() == out && dtype_of(bias), "engine: a bias has another dtype or shape than it should");
      linear.bias_dtype = *dtype_of(bias);
      held_.push_back(torch::stable::contiguous(bias));
      linear.bias = held_.back().const_data_ptr();
    }
    return linear;
  }

 private:
  std::vector<Tensor> tensors_;
  std::vector<int64_t> numbers_;
  std::vector<Tensor>& held_;
  std::vector<Memory>& memory_;
  size_t tensor_ = 0, number_ = 0;
};

int64_t engine_new(std::vector<Tensor> tensors, std::vector<int64_t> numbers, double epsilon, double rope_scale, int64_t threads,
                   int64_t cache_bits) {
  STD_TORCH_CHECK(threads >= 1 && threads <= 1024, "engine: ", threads, " threads");
  STD_TORCH_CHECK(cache_bits == 16 || cache_bits == 8, "engine: a cache of ", cache_bits, " bits");
  auto engine = std::make_shared<Engine>();
  Reading reading(std::move(tensors), std::move(numbers), *engine);
  Model model{};
  model.cache_bits = cache_bits;
  Shape& shape = model.shape;
  for (int64_t* field : {&shape.vocabulary, &shape.hidden, &shape.heads, &shape.key_heads, &shape.head, &shape.inner, &shape.positions}) {
    *field = reading.number();
    STD_TORCH_CHECK(*field > 0 && *field < (int64_t{1} << 32), "engine: a size of ", *field);
  }
  STD_TORCH_CHECK(shape.heads % shape.key_heads == 0 && shape.head % 2 == 0, "engine: heads do not divide");
  shape.epsilon = static_cast<float>(epsilon);
  shape.rope_scale = static_cast<float>(rope_scale);
  const int64_t blocks = reading.number(), queries = shape.heads * shape.head, keys = shape.key_heads * shape.head;
  model.embedding = reading.table(shape.vocabulary, shape.hidden, "the embedding", false);
  model.head = reading.table(shape.vocabulary, shape.hidden, "the head", true);
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
  engine->reader = std::make_unique<Reader>(std::move(model), static_cast<int>(threads));
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

Tensor engine_read(int64_t id, std::vector<int64_t> ids, std::vector<int64_t> sequences, bool every) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  const int64_t vocabulary = engine->reader->model().shape.vocabulary;
  std::vector<bool> wanted(ids.size(), every);
  std::map<int64_t, size_t> last;
  for (size_t i = 0; i < std::min(ids.size(), sequences.size()); ++i) last[sequences[i]] = i;
  for (const auto& [sequence, i] : last) wanted[i] = true;
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
  std::vector<float> values(ids.size() * static_cast<size_t>(vocabulary));
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
  const Tensor rows = torch::stable::contiguous(tiles);
  engine->held.push_back(torch::stable::contiguous(scale));
  const auto* factors = static_cast<const float*>(engine->held.back().const_data_ptr());
  const void* before = engine->reader->model().head.rows;
  engine->memory.push_back(large_pages(static_cast<size_t>(size)));
  std::memcpy(engine->memory.back().get(), rows.const_data_ptr(), static_cast<size_t>(size));
  engine->reader->set_head({engine->memory.back().get(), factors, Dtype::float32, true});
  std::erase_if(engine->memory, [&](const Memory& memory) { return memory.get() == before; });
}

std::vector<int64_t> engine_tokens(int64_t id, int64_t sequence) {
  const auto engine = find(id);
  const std::lock_guard<std::mutex> guard(engine->lock);
  return sequence_of(*engine, sequence).ids;
}

}  // namespace
}  // namespace bimos

STABLE_TORCH_LIBRARY_FRAGMENT(bimos, library) {
  library.def("engine_new(Tensor[] tensors, int[] numbers, float epsilon, float rope_scale, int threads, int cache_bits=16) -> int");
  library.def("engine_free(int engine) -> ()");
  library.def("engine_open(int engine) -> int");
  library.def("engine_close(int engine, int sequence) -> ()");
  library.def("engine_keep(int engine, int sequence, int source, int length) -> ()");
  library.def("engine_read(int engine, int[] ids, int[] sequences, bool every) -> Tensor");
  library.def("engine_next(int engine, int[] ids, int[] sequences, float[] options, int top_k, int[] seeds) -> int[]");
  library.def("engine_squares(int engine, int[] ids) -> Tensor");
  library.def("engine_head(int engine, Tensor tiles, Tensor scale) -> ()");
  library.def("engine_tokens(int engine, int sequence) -> int[]");
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
}
