#include "rounding/columns-inl.h"

namespace quern {
const ColumnKernels column_kernels_avx512 = QUERN_TABLE;
}
