// Panels of decoded weights: a register of a panel is four here, of four rows and four columns each.
#include "kernels/common_neon.h"
#include "kernels/tables.h"

namespace quern {
namespace {

// sums of 16 rows and TOKENS tokens, (TOKENS, 16).
template <int TOKENS>
INLINE void add_tokens(const int8_t* w, int32_t blocks, const int8_t* x, int64_t stride, int32_t* sums) {
  int32x4_t total[TOKENS][4];
  for (int t = 0; t < TOKENS; ++t)
    for (int i = 0; i < 4; ++i) total[t][i] = vld1q_s32(sums + 16 * t + 4 * i);
  int32_t b = 0;
  for (; b + 4 <= blocks; b += 4) {
    int8x16_t inputs[TOKENS];
    for (int t = 0; t < TOKENS; ++t) inputs[t] = load(x + t * stride + 4 * b);
#define QUERN_BLOCK(LANE)                                                             \
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) {                               \
    const int8x16_t rows = load(w + 64 * static_cast<int64_t>(b + LANE) + 16 * i);    \
    _Pragma("GCC unroll 4") for (int t = 0; t < TOKENS; ++t)                          \
      total[t][i] = vdotq_laneq_s32(total[t][i], rows, inputs[t], LANE);              \
  }
    QUERN_BLOCK(0)
    QUERN_BLOCK(1)
    QUERN_BLOCK(2)
    QUERN_BLOCK(3)
#undef QUERN_BLOCK
  }
  for (; b < blocks; ++b)
    for (int t = 0; t < TOKENS; ++t) {
      int32_t four;
      __builtin_memcpy(&four, x + t * stride + 4 * b, 4);
      const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four));
      for (int i = 0; i < 4; ++i)
        total[t][i] = vdotq_s32(total[t][i], load(w + 64 * static_cast<int64_t>(b) + 16 * i), inputs);
    }
  for (int t = 0; t < TOKENS; ++t)
    for (int i = 0; i < 4; ++i) vst1q_s32(sums + 16 * t + 4 * i, total[t][i]);
}

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums) {
  for (int32_t g = 0; g < row_groups; ++g) {
    const int8_t* w = panel + static_cast<int64_t>(g) * blocks * LANES;
    int32_t* out = sums + static_cast<int64_t>(g) * tokens * 16;
    int32_t t = 0;
    for (; t + 4 <= tokens; t += 4) add_tokens<4>(w, blocks, x + t * stride, stride, out + 16 * t);
    for (; t < tokens; ++t) add_tokens<1>(w, blocks, x + t * stride, stride, out + 16 * t);
  }
}

void flush(const int32_t* sums, int32_t row_groups, int32_t tokens, const float* ws, const float* xs, const int32_t* xsum,
           int64_t token_stride, int32_t flip, float* out) {
  for (int32_t g = 0; g < row_groups; ++g)
    for (int32_t t = 0; t < tokens; ++t)
      for (int32_t r = 0; r < 16; r += 4) {
        const int64_t at = (static_cast<int64_t>(g) * tokens + t) * 16 + r;
        const uint32_t shift = static_cast<uint32_t>(flip) * static_cast<uint32_t>(xsum[t * token_stride]);
        const int32x4_t sum = vsubq_s32(vld1q_s32(sums + at), vdupq_n_s32(static_cast<int32_t>(shift)));
        const float32x4_t scale = vmulq_n_f32(vld1q_f32(ws + 16 * g + r), xs[t * token_stride]);
        vst1q_f32(out + at, vfmaq_f32(vld1q_f32(out + at), vcvtq_f32_s32(sum), scale));
      }
}

}  // namespace

const Kernels panels_neon = {
    "neon", nullptr, nullptr, nullptr, nullptr, 0, panel, flush, nullptr, nullptr, nullptr,
};

}  // namespace quern
