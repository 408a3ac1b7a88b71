// Panels of decoded weights by SMMLA, which multiplies two rows of eight columns by two tokens: two registers of four columns are
// joined for it.
#include "kernels/common_neon.h"
#include "kernels/tables.h"

namespace quern {
namespace {

INLINE int8x16_t pairs(const int8_t* x, int64_t stride) { return vcombine_s8(vld1_s8(x), vld1_s8(x + stride)); }

// sums of 16 rows and 2 * PAIRS tokens, (tokens, 16), over `steps` times eight columns.
template <int PAIRS>
INLINE void add_pairs(const int8_t* w, int32_t steps, const int8_t* x, int64_t stride, int32_t* sums) {
  // total[p][i]: row 2 i of both tokens of pair p, then row 2 i + 1.
  int32x4_t total[PAIRS][8];
  for (int p = 0; p < PAIRS; ++p)
    for (int i = 0; i < 8; ++i) total[p][i] = vdupq_n_s32(0);
  for (int32_t s = 0; s < steps; ++s) {
    int8x16_t inputs[PAIRS];
    for (int p = 0; p < PAIRS; ++p) inputs[p] = pairs(x + 2 * p * stride + 8 * s, stride);
    for (int i = 0; i < 4; ++i) {
      const int32x4_t left = vreinterpretq_s32_s8(load(w + 128 * static_cast<int64_t>(s) + 16 * i));
      const int32x4_t right = vreinterpretq_s32_s8(load(w + 128 * static_cast<int64_t>(s) + 64 + 16 * i));
      const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(left, right)), high = vreinterpretq_s8_s32(vzip2q_s32(left, right));
      for (int p = 0; p < PAIRS; ++p) {
        total[p][2 * i] = vmmlaq_s32(total[p][2 * i], low, inputs[p]);
        total[p][2 * i + 1] = vmmlaq_s32(total[p][2 * i + 1], high, inputs[p]);
      }
    }
  }
  for (int p = 0; p < PAIRS; ++p)
    for (int i = 0; i < 4; ++i) {
      const int32x4_t first = vuzp1q_s32(total[p][2 * i], total[p][2 * i + 1]), second = vuzp2q_s32(total[p][2 * i], total[p][2 * i + 1]);
      int32_t* to = sums + 32 * p + 4 * i;
      vst1q_s32(to, vaddq_s32(vld1q_s32(to), first));
      vst1q_s32(to + 16, vaddq_s32(vld1q_s32(to + 16), second));
    }
}

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums) {
  if (blocks % 2 != 0) return panels_neon.panel(panel, row_groups, blocks, x, stride, tokens, sums);
  for (int32_t g = 0; g < row_groups; ++g) {
    const int8_t* w = panel + static_cast<int64_t>(g) * blocks * LANES;
    int32_t* out = sums + static_cast<int64_t>(g) * tokens * 16;
    int32_t t = 0;
    for (; t + 4 <= tokens; t += 4) add_pairs<2>(w, blocks / 2, x + t * stride, stride, out + 16 * t);
    for (; t + 2 <= tokens; t += 2) add_pairs<1>(w, blocks / 2, x + t * stride, stride, out + 16 * t);
    if (t < tokens) panels_neon.panel(w, 1, blocks, x + t * stride, stride, 1, out + 16 * t);
  }
}

}  // namespace

const Kernels panels_i8mm = {
    "i8mm", nullptr, nullptr, nullptr, nullptr, 0, panel, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace quern
