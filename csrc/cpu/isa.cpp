// Chosen once per process, on first use.
#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef MOBA_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moba {

namespace {

struct Level {
  const char* name;
  bool runs_here;
};

#ifdef MOBA_HAVE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#ifdef MOBA_HAVE_AMX
// Linux hands out the tile registers' state only to processes that ask for it.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Level* find(const Level* levels, int count, const char* name) {
  for (int i = 0; i < count; ++i) {
    if (levels[i].runs_here && (name == nullptr || std::string(name) == levels[i].name))
      return &levels[i];
  }
  return nullptr;
}

}  // namespace

const char* cpu_isa() {
  static const char* const chosen = [] {
    const Level levels[] = {
#ifdef MOBA_HAVE_AMX
        {"amx", has_avx512() && __builtin_cpu_supports("avx512bf16") &&
                    __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                    may_use_tiles()},
#endif
#ifdef MOBA_HAVE_AVX512_BF16
        {"avx512_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16")},
#endif
#ifdef MOBA_HAVE_AVX512
        {"avx512", has_avx512()},
#endif
#ifdef MOBA_HAVE_AVX2
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c")},
#endif
        {"generic", true},
    };
    const char* wanted = std::getenv("MOBA_CPU_ISA");
    const Level* level = find(levels, sizeof(levels) / sizeof(levels[0]), wanted);
    if (level == nullptr) {
      std::string known;
      for (const Level& each : levels)
        known += std::string(each.runs_here ? " " : " (not here) ") + each.name;
      throw std::runtime_error("MOBA_CPU_ISA is " + std::string(wanted) + ", allowed:" + known);
    }
    return level->name;
  }();
  return chosen;
}

}  // namespace moba
