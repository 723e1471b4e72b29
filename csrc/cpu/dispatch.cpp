// Picks the kernel table of the level that runs here.
#include <cstring>

#include "cpu/isa.h"
#include "cpu/kernels/kernels.h"

namespace moba {

#ifdef MOBA_HAVE_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif
#ifdef MOBA_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
namespace generic {
extern const Kernels table;
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const Kernels* const tables[] = {
#ifdef MOBA_HAVE_AVX512
        &avx512::table,
#endif
#ifdef MOBA_HAVE_AVX2
        &avx2::table,
#endif
        &generic::table,
    };
    for (const Kernels* each : tables) {
      if (std::strcmp(each->isa, cpu_isa()) == 0) return *each;
    }
    return generic::table;
  }();
  return chosen;
}

}  // namespace moba
