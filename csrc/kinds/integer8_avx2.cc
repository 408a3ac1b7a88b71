// 8-bit integers; see rows_avx2-inl.h.
#include "kinds/rows_avx2-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 1;
  static constexpr bool NARROW = false;
  INLINE Code make(const Weight&, int32_t) { return {}; }

  template <int TOKENS>
  INLINE void add(const Code&, __m256i bytes, const Inputs& in, int64_t at, __m256i* sums, int64_t) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
      sums[t] = _mm256_add_epi32(sums[t], products(bytes, load(in.values + t * in.stride + at)));
  }
};

}  // namespace

const KindKernels integer8_avx2 = {multiply<Code>, nullptr, nullptr};

}  // namespace quern
