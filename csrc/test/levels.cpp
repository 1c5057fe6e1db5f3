// Every level that this processor has against sums in double (what training and the engine have besides: against the plain level),
// without Python: for emulated processors (`make emulate`).
//
//   levels [NAME]    exits with 1 where a product is off, or where the highest level is not NAME
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../int4.h"
#include "../linear.h"
#include "../tiles.h"
#include "training.h"

namespace {

double error_of(const bimos::Level& level, int64_t in, int64_t out, int64_t tokens) {
  std::mt19937 random(static_cast<unsigned>(in * 1000 + out));
  std::normal_distribution<float> normal;
  std::vector<uint8_t> bits(static_cast<size_t>(out * in / 8));
  for (auto& byte : bits) byte = static_cast<uint8_t>(random());
  std::vector<float> x(static_cast<size_t>(tokens * in)), y(static_cast<size_t>(tokens * out));
  for (auto& value : x) value = normal(random);
  const bimos::Plane plane{nullptr, in, bimos::kBlock, false, false};
  std::vector<uint8_t> tiles(static_cast<size_t>(bimos::tile_count(level.layout, out) * bimos::tile_bytes(level.layout, plane)));
  bimos::make_tiles(level.layout, bits.data(), nullptr, out, in, bimos::kBlock, tiles.data());
  bimos::Linear linear{};
  linear.in = in;
  linear.out = out;
  linear.planes = linear.experts = 1;
  linear.block = bimos::kBlock;
  linear.tiles = tiles.data();
  const bimos::Pool alone{1, nullptr};
  bimos::apply(level, linear, x.data(), bimos::Dtype::float32, tokens, y.data(), alone);
  double off = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < out; ++r) {
      double sum = 0;
      for (int64_t j = 0; j < in; ++j) {
        const bool positive = (bits[static_cast<size_t>(r * (in / 8) + j / 8)] >> (j % 8) & 1) != 0;
        sum += positive ? x[static_cast<size_t>(t * in + j)] : -x[static_cast<size_t>(t * in + j)];
      }
      const double difference = y[static_cast<size_t>(t * out + r)] - sum;
      off += difference * difference;
    }
  }
  // Against what random signs give: a single sum may cancel to almost nothing.
  return std::sqrt(off / static_cast<double>(tokens * out * in));
}

double value_of_int4(const uint8_t* tiles, int64_t row, int64_t j, int64_t n) {
  const uint8_t* tile = tiles + row / bimos::kTileRows * bimos::int4_tile_bytes(n);
  const int64_t r = row % bimos::kTileRows, group = j / bimos::kGroup, k = j % bimos::kGroup;
  const uint8_t codes = tile[group * bimos::kTileGroup + k / 8 * 64 + r * 4 + k % 4];
  uint16_t stored = 0;
  std::memcpy(&stored, tile + bimos::int4_groups(n) * bimos::kTileGroup + (group * bimos::kTileRows + r) * 2, 2);
  const uint16_t half = stored & 0xfff0;
  float scale = 0;
  bimos::scalar_level().load(&half, bimos::Dtype::float16, 1, &scale);
  return scale * ((codes >> (k / 4 % 2 * 4) & 15) - (stored & 15));
}

double error_of_rows(const bimos::Level& level, bool four_bits, int64_t n, int64_t count, int tokens) {
  std::mt19937 random(static_cast<unsigned>(n * 1000 + count));
  std::normal_distribution<float> normal;
  std::vector<int8_t> weight(static_cast<size_t>(count * n));
  for (auto& value : weight) value = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
  std::vector<uint8_t> tiles(static_cast<size_t>(bimos::int4_tiles(count) * bimos::int4_tile_bytes(n)));
  const std::vector<float> floats(weight.begin(), weight.end()), alike(static_cast<size_t>(n), 1.0F);
  for (int64_t r = 0; r < count; r += bimos::kTileRows) {
    bimos::int4_pack(level.name, floats.data() + r * n, alike.data(), std::min(bimos::kTileRows, count - r), n,
                     tiles.data() + r / bimos::kTileRows * bimos::int4_tile_bytes(n));
  }
  const auto bytes = static_cast<int64_t>(four_bits ? bimos::int4_bytes(n) : level.rows.int8_bytes(n));
  std::vector<float> x(static_cast<size_t>(tokens * n)), result(static_cast<size_t>(tokens * count));
  std::vector<uint8_t> buffer(static_cast<size_t>(tokens * bytes + 64));
  uint8_t* aligned = buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64;
  const uint8_t* prepared[bimos::kTokens];
  float* y[bimos::kTokens];
  for (auto& value : x) value = normal(random);
  for (int t = 0; t < tokens; ++t) {
    (four_bits ? bimos::int4_prepare : level.rows.int8_prepare)(x.data() + t * n, n, aligned + t * bytes);
    prepared[t] = aligned + t * bytes;
    y[t] = result.data() + t * count;
  }
  if (four_bits) {
    level.rows.int4(tiles.data(), count, n, prepared, tokens, y);
  } else {
    level.rows.int8(weight.data(), count, n, prepared, tokens, y);
  }
  double off = 0, size = 0;
  for (int t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < count; ++r) {
      double sum = 0, squares = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double value = four_bits ? value_of_int4(tiles.data(), r, j, n) : weight[static_cast<size_t>(r * n + j)];
        const double product = value * x[static_cast<size_t>(t * n + j)];
        sum += product;
        squares += product * product;
      }
      off += (y[t][r] - sum) * (y[t][r] - sum);
      size += squares;
    }
  }
  return std::sqrt(off / size);
}

}  // namespace

int main(int argc, char** argv) {
  int failed = 0;
  const char* highest = bimos::level().name;
  std::printf("highest level: %s\n", highest);
  if (argc > 1 && std::strcmp(argv[1], highest) != 0) {
    std::printf("expected %s\n", argv[1]);
    failed = 1;
  }
  for (const char* name : {"scalar", "avx2", "avx512", "amx"}) {
    if (!bimos::use_level(name)) continue;
    double worst = 0;
    for (const int64_t in : {8, 40, 576, 1536})
      for (const int64_t out : {1, 33, 192})
        for (const int64_t tokens : {1, 2, 3, 6, 9, 19, 40}) worst = std::max(worst, error_of(bimos::level(), in, out, tokens));
    for (const int64_t n : {1, 40, 576, 5000})
      for (const int64_t count : {1, 17, 64})
        for (const int tokens : {1, 2, 3, 4})
          for (const bool four_bits : {false, true}) worst = std::max(worst, error_of_rows(bimos::level(), four_bits, n, count, tokens));
    const double training = training_difference(name);
    const double engine = engine_difference(name);
    std::printf("%-7s relative error %.1e, in training %.1e, in the engine %.1e\n", name, worst, training, engine);
    if (!(worst < 1e-4 && training < 1e-4 && engine < 1e-4)) failed = 1;
  }
  return failed;
}
