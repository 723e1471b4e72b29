// Picks the kernel table of the level that runs here.
#include <cstring>

#include "cpu/isa.h"
#include "cpu/kernels/kernels.h"

namespace moba {

#ifdef MOBA_HAVE_AMX
namespace amx {
extern const Kernels table;
}
#endif
#ifdef MOBA_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels table;
}
#endif
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
  static const Kernels* const chosen = [] {
    const Kernels* const tables[] = {
#ifdef MOBA_HAVE_AMX
        &amx::table,
#endif
#ifdef MOBA_HAVE_AVX512_BF16
        &avx512_bf16::table,
#endif
#ifdef MOBA_HAVE_AVX512
        &avx512::table,
#endif
#ifdef MOBA_HAVE_AVX2
        &avx2::table,
#endif
        &generic::table,
    };
    const Kernels* const* table = tables;
    while (std::strcmp((*table)->isa, cpu_isa()) != 0) ++table;  // cpu_isa names one of them
    return *table;
  }();
  return *chosen;
}

}  // namespace moba
