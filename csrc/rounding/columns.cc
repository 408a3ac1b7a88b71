#include "rounding/columns.h"

namespace quern {

const ColumnKernels& column_kernels(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx" || isa == "avx512") return column_kernels_avx512;
  if (isa == "avx2") return column_kernels_avx2;
#endif
  (void)isa;
  return column_kernels_scalar;
}

}  // namespace quern
