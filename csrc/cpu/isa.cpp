// Chosen once per process, on first use.
#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef MOBA_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moba {

namespace {

// runs_here is asked only of levels that may be taken: asking for "amx" changes the process.
struct Level {
  const char* name;
  bool (*runs_here)();
};

#if defined(__x86_64__)
// For what compilers differ on whether __builtin_cpu_supports knows it.
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

[[maybe_unused]] bool has_avx2() {
  const bool f16c = Cpuid(1, 0).ecx >> 29 & 1;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

#ifdef MOBA_HAVE_AMX
// AMX_BF16 and AMX_TILE, a palette of tiles, and the system's leave: Linux hands out the state of
// the tile registers only to processes that ask for it.
bool has_amx() {
  constexpr unsigned kFeatures = 1u << 22 | 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return has_avx512_bf16() && (Cpuid(7, 0).edx & kFeatures) == kFeatures &&
         Cpuid(0x1d, 0).eax >= 1 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Level kLevels[] = {
#ifdef MOBA_HAVE_AMX
    {"amx", has_amx},
#endif
#ifdef MOBA_HAVE_AVX512_BF16
    {"avx512_bf16", has_avx512_bf16},
#endif
#ifdef MOBA_HAVE_AVX512
    {"avx512", has_avx512},
#endif
#ifdef MOBA_HAVE_AVX2
    {"avx2", has_avx2},
#endif
    {"generic", [] { return true; }},
};

}  // namespace

const char* cpu_isa() {
  static const char* const chosen = [] {
    const char* const wanted = std::getenv("MOBA_CPU_ISA");
    for (const Level& level : kLevels) {
      if ((wanted == nullptr || std::string(wanted) == level.name) && level.runs_here())
        return level.name;
    }
    std::string known;
    for (const Level& level : kLevels)
      known += std::string(level.runs_here() ? " " : " (not here) ") + level.name;
    throw std::runtime_error("MOBA_CPU_ISA is " + std::string(wanted) + ", allowed:" + known);
  }();
  return chosen;
}

}  // namespace moba
