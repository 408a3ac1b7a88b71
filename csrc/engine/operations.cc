#include "engine/operations.h"

#include "kernels/dispatch.h"

namespace quern {

const Operations& operations() {
#if defined(__x86_64__)
  const std::string isa = active_isa();
  if (isa == "amx" || isa == "avx512") return operations_avx512;
  if (isa == "avx2") return operations_avx2;
#endif
  return operations_scalar;
}

}  // namespace quern
