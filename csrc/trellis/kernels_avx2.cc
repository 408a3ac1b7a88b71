#include "trellis/kernels-inl.h"

namespace quern {
const TrellisKernels trellis_kernels_avx2 = QUERN_TABLE;
}
