#include "trellis/kernels-inl.h"

namespace quern {
const TrellisKernels trellis_kernels_scalar = QUERN_TABLE;
}
