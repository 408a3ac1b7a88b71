// 8-bit floating-point numbers: value = number * scale. They meet inputs as they are, like plain numbers.
#include <cmath>

#include "kinds/float8-inl.h"
#include "kinds/kinds.h"
#include "kinds/scalar_rows.h"

namespace quern {
namespace {

// A number as kernels meet it: divided by its unit, which is exact.
template <Float8 TYPE>
float float8_number(uint8_t byte) {
  if (TYPE == Float8::e4m3) return scalar::number(&byte, Float::float8_e4m3, 0) * (1 / UNIT<TYPE>);
  const uint16_t half = static_cast<uint16_t>(byte << 8);  // e5m2 is the upper half of a float16
  return scalar::number(&half, Float::float16, 0);
}

template <Float8 TYPE>
void multiply_float8_scalar(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  for (int32_t row = first; row < last; ++row) {
    const uint8_t* w = code_row(weight, row);
    for (int32_t t = 0; t < in.tokens; ++t) {
      const float* x = in.exact + static_cast<int64_t>(t) * in.columns;
      float out = 0.0f;
      for (int32_t g = 0, start = 0; start < in.columns; ++g, start += weight.group) {
        float lanes[16] = {};
        const int32_t end = std::min(start + weight.group, in.columns);
        for (int32_t c = start; c < end; ++c)
          lanes[(c - start) % 16] = fmaf(float8_number<TYPE>(w[c]), x[c], lanes[(c - start) % 16]);
        for (int32_t width = 8; width > 0; width /= 2)
          for (int32_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
        out = fmaf(lanes[0], scalar::scale_of(weight, row, g) * UNIT<TYPE>, out);
      }
      outputs[t * in.rows + row] = out;
    }
  }
}

template <Float8 TYPE>
void decode_float8(const Weight& weight, int32_t row, float* out) {
  const uint8_t* w = code_row(weight, row);
  for (int32_t c = 0; c < weight.columns; ++c)
    out[c] = float8_number<TYPE>(w[c]) * UNIT<TYPE> * scalar::scale_of(weight, row, c / weight.group);
}

int64_t row_bytes(int64_t columns) { return columns; }

const KindKernels e4m3_scalar = {multiply_float8_scalar<Float8::e4m3>, nullptr, nullptr};
const KindKernels e5m2_scalar = {multiply_float8_scalar<Float8::e5m2>, nullptr, nullptr};

}  // namespace

const WeightKind float8_e4m3 = {
    "float8_e4m3", true, true, false, 1, row_bytes, nullptr, nullptr, nullptr, decode_float8<Float8::e4m3>,
    {&e4m3_scalar, X86_KERNELS(float8_e4m3_avx2), AVX512_KERNELS(float8_e4m3_avx512), nullptr},
};
const WeightKind float8_e5m2 = {
    "float8_e5m2", true, true, false, 1, row_bytes, nullptr, nullptr, nullptr, decode_float8<Float8::e5m2>,
    {&e5m2_scalar, X86_KERNELS(float8_e5m2_avx2), AVX512_KERNELS(float8_e5m2_avx512), nullptr},
};

}  // namespace quern
