// 4-bit integers; see rows_avx2-inl.h.
#include "kinds/rows_avx2-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 2;
  static constexpr bool NARROW = true;
  INLINE Code make(const Weight&, int32_t) { return {}; }

  template <int TOKENS>
  INLINE void add(const Code&, __m256i bytes, const Inputs& in, int64_t at, __m256i* sums, int64_t) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(bytes, mask), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      const int8_t* even = in.halves + 2 * t * in.half + at;
      const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(low, load(even)), _mm256_maddubs_epi16(high, load(even + in.half)));
      sums[t] = _mm256_add_epi16(sums[t], both);
    }
  }
};

}  // namespace

const KindKernels integer4_avx2 = {multiply<Code>, nullptr, nullptr};

}  // namespace quern
