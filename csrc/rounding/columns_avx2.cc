#include "rounding/columns-inl.h"

namespace quern {
const ColumnKernels column_kernels_avx2 = QUERN_TABLE;
}
