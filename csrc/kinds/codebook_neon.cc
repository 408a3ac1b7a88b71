// Codes with tables of four or sixteen entries, which TBL looks up; see rows_neon-inl.h. Those of three bits are left to the scalar
// version.
#include "kinds/codebook-inl.h"
#include "kinds/rows_neon-inl.h"

namespace quern {
namespace {

template <int BITS>
struct Code {
  static constexpr int PER_BYTE = 8 / BITS;
  static constexpr bool NARROW = false;

  Code(const Weight& weight, int32_t row, int32_t group) {
    int8_t entries[REGISTER] = {};
    __builtin_memcpy(entries, table_of(weight, row, group), 1 << BITS);
    table = vld1q_s8(entries);
  }
  static const KindKernels& scalar() { return BITS == 2 ? codebook2_scalar : codebook4_scalar; }

  template <int WHICH>
  int8x16_t plane(uint8x16_t bytes) const {
    uint8x16_t codes = bytes;
    if constexpr (WHICH > 0) codes = vshrq_n_u8(bytes, BITS * WHICH);
    if constexpr (WHICH + 1 < PER_BYTE) codes = vandq_u8(codes, vdupq_n_u8((1 << BITS) - 1));
    return vqtbl1q_s8(table, codes);
  }

  int32x4_t add(int32x4_t sum, uint8x16_t bytes, const Inputs& in, int32_t token, int64_t at) const {
    if constexpr (BITS == 4) {
      const int8_t* even = in.halves + 2 * token * in.half + at;
      return vdotq_s32(vdotq_s32(sum, plane<0>(bytes), load(even)), plane<1>(bytes), load(even + in.half));
    } else {
      const int8_t* first = in.quarters + 4 * token * in.quarter + at;
      sum = vdotq_s32(vdotq_s32(sum, plane<0>(bytes), load(first)), plane<1>(bytes), load(first + in.quarter));
      sum = vdotq_s32(sum, plane<2>(bytes), load(first + 2 * in.quarter));
      return vdotq_s32(sum, plane<3>(bytes), load(first + 3 * in.quarter));
    }
  }

  void values(uint8x16_t bytes, int8x16_t* found) const {
    if constexpr (BITS == 4) {
      const int8x16_t low = plane<0>(bytes), high = plane<1>(bytes);
      found[0] = vzip1q_s8(low, high);
      found[1] = vzip2q_s8(low, high);
    } else {
      const int8x16_t a = plane<0>(bytes), b = plane<1>(bytes), c = plane<2>(bytes), d = plane<3>(bytes);
      const int16x8_t ab[2] = {vreinterpretq_s16_s8(vzip1q_s8(a, b)), vreinterpretq_s16_s8(vzip2q_s8(a, b))};
      const int16x8_t cd[2] = {vreinterpretq_s16_s8(vzip1q_s8(c, d)), vreinterpretq_s16_s8(vzip2q_s8(c, d))};
      for (int i = 0; i < 2; ++i) {
        found[2 * i] = vreinterpretq_s8_s16(vzip1q_s16(ab[i], cd[i]));
        found[2 * i + 1] = vreinterpretq_s8_s16(vzip2q_s16(ab[i], cd[i]));
      }
    }
  }

  int8x16_t table;
};

}  // namespace

const KindKernels codebook2_neon = {multiply<Code<2>>, nullptr, panel<Code<2>>};
const KindKernels codebook3_neon = {nullptr, nullptr, nullptr};
const KindKernels codebook4_neon = {multiply<Code<4>>, nullptr, panel<Code<4>>};

}  // namespace quern
