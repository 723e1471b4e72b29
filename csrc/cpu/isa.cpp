// Chosen once per process, on first use.
#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace moba {

namespace {

struct Level {
  const char* name;
  bool runs_here;
};

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
#ifdef MOBA_HAVE_AVX512
        {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
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
