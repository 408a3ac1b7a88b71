#include "trellis/kernels.h"

namespace quern {

const TrellisKernels& trellis_kernels(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx" || isa == "avx512") return trellis_kernels_avx512;
  if (isa == "avx2") return trellis_kernels_avx2;
#endif
  (void)isa;
  return trellis_kernels_scalar;
}

}  // namespace quern
