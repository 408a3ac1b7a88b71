// 4-bit integers; see rows_neon-inl.h.
#include "kinds/rows_neon-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 2;
  static constexpr bool NARROW = true;

  Code(const Weight& weight, int32_t row, int32_t group) : zero(vdupq_n_s8(static_cast<int8_t>(zero_at(weight, row, group)))) {}
  static const KindKernels& scalar() { return *integer4.kernels[0]; }

  INLINE int32x4_t product(int32x4_t sum, uint8x16_t bytes, const int8_t* even, int64_t odd) {
    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    return vdotq_s32(vdotq_s32(sum, low, load(even)), high, load(even + odd));
  }

  int32x4_t add(int32x4_t sum, uint8x16_t bytes, const Inputs& in, int32_t token, int64_t at) const {
    return product(sum, bytes, in.halves + 2 * token * in.half + at, in.half);
  }

  void values(uint8x16_t bytes, int8x16_t* found) const {
    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    found[0] = vsubq_s8(vzip1q_s8(low, high), zero);
    found[1] = vsubq_s8(vzip2q_s8(low, high), zero);
  }

  int8x16_t zero;
};

}  // namespace

const KindKernels integer4_neon = {multiply<Code>, nullptr, panel<Code>};

}  // namespace quern
