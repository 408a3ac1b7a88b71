#include "engine/operations.h"

#include "kernels/dispatch.h"
#include "kernels/isas.h"

namespace quern {

const Operations& operations() {
  [[maybe_unused]] const std::string isa = active_isa();
#if QUERN_X86_WIDE
  if (isa == "amx" || isa == "avx512") return operations_avx512;
#endif
#if QUERN_X86
  if (isa == "avx2") return operations_avx2;
#endif
#if QUERN_ARM
  if (isa == "neon" || isa == "i8mm") return operations_neon;
#endif
  return operations_scalar;
}

}  // namespace quern
