#include "rounding/columns-inl.h"

namespace quern {
const ColumnKernels column_kernels_scalar = QUERN_TABLE;
}
