// Scalar functions of plain numbers.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/scalar.h"

namespace quern {

template <Float TYPE>
void multiply_plain_scalar(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  for (int32_t row = first; row < last; ++row) {
    const char* w = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
    for (int32_t t = 0; t < in.tokens; ++t) {
      const float* x = in.exact + static_cast<int64_t>(t) * in.columns;
      float lanes[16] = {};
      for (int32_t c = 0; c < in.columns; ++c) lanes[c % 16] = fmaf(scalar::number(w, TYPE, c), x[c], lanes[c % 16]);
      for (int32_t width = 8; width > 0; width /= 2)
        for (int32_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
      outputs[t * in.rows + row] = lanes[0];
    }
  }
}

template <Float TYPE>  // bfloat16 or float32
void decode_plain(const Weight& weight, int32_t row, float* out) {
  const char* w = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
  if (TYPE == Float::float32) {
    memcpy(out, w, sizeof(float) * weight.columns);
    return;
  }
  for (int32_t c = 0; c < weight.columns; ++c) {
    uint16_t half;
    memcpy(&half, w + 2 * static_cast<int64_t>(c), 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    memcpy(out + c, &bits, 4);
  }
}

template <int64_t BYTES>
int64_t plain_row_bytes(int64_t columns) {
  return BYTES * columns;
}

}  // namespace quern
