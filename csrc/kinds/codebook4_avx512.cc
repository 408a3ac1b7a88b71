// 4-bit codes that a table has values for; see rows_avx512-inl.h.
#include "kinds/panels_avx512-inl.h"
#include "kinds/rows_avx512-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 2, REGISTERS = 2;
  static constexpr int SHIFT = 128;
  __m512i mask, table;
  INLINE Code make(const Weight& weight) {
    const __m128i entries = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.table)), _mm_set1_epi8(-128));
    return {_mm512_set1_epi8(15), _mm512_broadcast_i32x4(entries)};
  }
  INLINE __m512i codes(const Code& self, __m512i bytes, int which) {
    const __m512i index = _mm512_and_si512(which == 0 ? bytes : _mm512_srli_epi16(bytes, 4), self.mask);
    return _mm512_shuffle_epi8(self.table, index);
  }
};

struct Values {
  __m512i table;

  Values(const Weight& weight, int32_t, int32_t, uint8_t bias) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.table));
    table = _mm512_xor_si512(_mm512_broadcast_i32x4(entries), _mm512_set1_epi8(static_cast<char>(bias)));
  }

  INLINE __m512i of(const Values& self, __m512i codes, int32_t) { return _mm512_shuffle_epi8(self.table, codes); }
};

}  // namespace

const KindKernels codebook4_avx512 = {multiply<Code>, nullptr, decode_nibbles<Values>};

}  // namespace quern
