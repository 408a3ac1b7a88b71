// 4-bit codes that a table has values for; see rows_avx2-inl.h.
#include "kinds/rows_avx2-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 2;
  static constexpr bool NARROW = false;
  __m256i table;
  INLINE Code make(const Weight& weight) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.table)))};
  }

  template <int TOKENS>
  INLINE void add(const Code& self, __m256i bytes, const Inputs& in, int64_t at, __m256i* sums) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(self.table, _mm256_and_si256(bytes, mask));
    const __m256i high = _mm256_shuffle_epi8(self.table, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      const int8_t* even = in.halves + 2 * t * in.half + at;
      sums[t] = _mm256_add_epi32(sums[t], _mm256_add_epi32(products(low, load(even)), products(high, load(even + in.half))));
    }
  }
};

}  // namespace

const KindKernels codebook4_avx2 = {multiply<Code>, nullptr, nullptr};

}  // namespace quern
