// Which level this process works at.
#include "level.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx.h"

namespace bimos {
namespace {

// Highest first.
struct Candidate {
  const Level& (*level)();
  bool (*runs_here)();
};

#ifdef BIMOS_X86
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

bool has_amx() { return has_avx512() && __builtin_cpu_supports("avx512bf16") && amx::is_usable(); }
#endif

bool always() { return true; }

constexpr Candidate kCandidates[] = {
#ifdef BIMOS_X86
    {amx_level, has_amx},
    {avx512_level, has_avx512},
    {avx2_level, has_avx2},
#endif
    {scalar_level, always},
};

const Level* find(const char* name) {
  for (const Candidate& candidate : kCandidates) {
    if ((name == nullptr || std::strcmp(candidate.level().name, name) == 0) && candidate.runs_here()) return &candidate.level();
  }
  return nullptr;
}

const Level* first_choice() {
  const char* wanted = std::getenv("BIMOS_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    if (const Level* found = find(wanted)) return found;
    std::fprintf(stderr, "bimos: BIMOS_ISA=%s is unknown or not of this processor; using the highest it has\n", wanted);
  }
  return find(nullptr);
}

std::atomic<const Level*> current{nullptr};

}  // namespace

const Level& level() {
  const Level* known = current.load(std::memory_order_acquire);
  if (known == nullptr) {
    known = first_choice();
    current.store(known, std::memory_order_release);
  }
  return *known;
}

bool use_level(const char* name) {
  const Level* found = find(name);
  if (found != nullptr) current.store(found, std::memory_order_release);
  return found != nullptr;
}

}  // namespace bimos
