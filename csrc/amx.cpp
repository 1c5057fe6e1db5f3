#include "amx.h"

#if defined(BIMOS_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bimos::amx {
namespace {

bool ask() {
#if defined(BIMOS_X86) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBfloat16 = 1U << 22, kTile = 1U << 24, kInt8 = 1U << 25, kAll = kBfloat16 | kTile | kInt8;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of asm/prctl.h, which old systems do not have
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool is_usable() {
  static const bool answer = ask();
  return answer;
}

}  // namespace bimos::amx
