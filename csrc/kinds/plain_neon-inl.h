// Plain numbers: sixteen partial sums for each row; see kernels/kernels.h.
// No include guard and no linkage: for <kind>_neon.cc alone.
#include "kernels/common_neon.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

template <Float TYPE>
INLINE float32x4_t four_numbers(const char* row, int32_t column) {
  if constexpr (TYPE == Float::float32) {
    return vld1q_f32(reinterpret_cast<const float*>(row) + column);
  } else {
    uint16_t halves[4];
    __builtin_memcpy(halves, row + 2 * static_cast<int64_t>(column), 8);
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(halves), 16));
  }
}

template <Float TYPE>
void multiply_plain(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  for (int32_t t = 0; t < in.tokens; ++t) {
    const float* x = in.exact + static_cast<int64_t>(t) * in.columns;
    for (int32_t row = first; row < last; ++row) {
      const char* w = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
      float32x4_t sums[4];
      for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
      int32_t c = 0;
      for (; c + 16 <= in.columns; c += 16)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = vfmaq_f32(sums[i], four_numbers<TYPE>(w, c + 4 * i), vld1q_f32(x + c + 4 * i));
      float lanes[16];
      for (int i = 0; i < 4; ++i) vst1q_f32(lanes + 4 * i, sums[i]);
      for (; c < in.columns; ++c) lanes[c % 16] = __builtin_fmaf(number(w, TYPE, c), x[c], lanes[c % 16]);
      for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
      outputs[t * in.rows + row] = lanes[0];
    }
  }
}

}  // namespace
}  // namespace quern
