#pragma once

#include <cstdint>

#include "kernels/weight.h"

namespace quern {

// Row `row` of a weight of any kind, float32 (columns,).
void decode_row(const Weight& weight, int32_t row, float* out);

}  // namespace quern
