// 8-bit integers; see rows_neon-inl.h.
#include "kinds/rows_neon-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 1;
  static constexpr bool NARROW = false;

  Code(const Weight&, int32_t, int32_t) {}
  static const KindKernels& scalar() { return *integer8.kernels[0]; }

  int32x4_t add(int32x4_t sum, uint8x16_t bytes, const Inputs& in, int32_t token, int64_t at) const {
    return vdotq_s32(sum, vreinterpretq_s8_u8(bytes), load(in.values + token * in.stride + at));
  }

  void values(uint8x16_t bytes, int8x16_t* found) const { found[0] = vreinterpretq_s8_u8(bytes); }
};

}  // namespace

const KindKernels integer8_neon = {multiply<Code>, nullptr, panel<Code>};

}  // namespace quern
