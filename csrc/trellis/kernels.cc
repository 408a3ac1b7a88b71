#include "trellis/kernels.h"

#include "kernels/isas.h"

namespace quern {

const TrellisKernels& trellis_kernels(const std::string& isa) {
#if QUERN_X86_WIDE
  if (isa == "amx" || isa == "avx512") return trellis_kernels_avx512;
#endif
#if QUERN_X86
  if (isa == "avx2") return trellis_kernels_avx2;
#endif
  (void)isa;
  return trellis_kernels_scalar;
}

}  // namespace quern
