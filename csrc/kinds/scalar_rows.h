// Scalar functions of the kinds whose integers lie along the rows. A kind says in a class `Values` what its codes stand for:
// `Values(weight, row, group)` and in it the value `operator()(column)`.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/scalar.h"

namespace quern {

// sum over groups, in order, of fma(float(sum of values * inputs), ws * xs, out).
template <typename Values>
void multiply_rows_scalar(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  for (int32_t row = first; row < last; ++row) {
    for (int32_t t = 0; t < in.tokens; ++t) {
      const int8_t* x = in.values + t * in.stride;
      float out = 0.0f;
      for (int32_t g = 0; g < in.groups; ++g) {
        const Values value(weight, row, g);
        int32_t sum = 0;
        const int32_t end = std::min((g + 1) * in.group, in.columns);
        for (int32_t c = g * in.group; c < end; ++c) sum += value(c) * x[c];
        out = fmaf(static_cast<float>(sum), scalar::scale_of(weight, row, g) * in.scale[t * in.groups + g], out);
      }
      outputs[t * in.rows + row] = out;
    }
  }
}

template <typename Values>
void decode_panel_scalar(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  for (int32_t row = 0; row < part.rows; ++row)
    for (int32_t c = 0; c < part.columns; ++c) {
      const int32_t column = part.first_column + c;
      const int32_t value = Values(weight, part.first_row + row, column / weight.group)(column);
      panel[(row / 16 * static_cast<int64_t>(part.blocks) + c / 4) * LANES + row % 16 * 4 + c % 4] =
          static_cast<int8_t>(value ^ flip);
    }
}

template <typename Values>
void decode_row_scalar(const Weight& weight, int32_t row, float* out) {
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group;
  for (int32_t g = 0; g < groups; ++g) {
    const Values value(weight, row, g);
    const float scale = scalar::scale_of(weight, row, g);
    const int32_t end = std::min((g + 1) * weight.group, weight.columns);
    for (int32_t c = g * weight.group; c < end; ++c) out[c] = static_cast<float>(value(c)) * scale;
  }
}

// 4-bit codes lie two a byte, low nibble first, in rows of whole 32-bit words.
inline int64_t nibble_row_bytes(int64_t columns) { return (columns + 7) / 8 * 4; }

inline const uint8_t* code_row(const Weight& weight, int32_t row) {
  return static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
}

inline int32_t nibble(const uint8_t* row, int32_t column) { return row[column / 2] >> 4 * (column % 2) & 15; }

}  // namespace quern
