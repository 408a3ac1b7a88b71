#include "trellis/kernels-inl.h"

namespace quern {
const TrellisKernels trellis_kernels_avx512 = QUERN_TABLE;
}
