// 4-bit integers; see rows_avx512-inl.h.
#include "kinds/panels_avx512-inl.h"
#include "kinds/rows_avx512-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 2, REGISTERS = 2;
  static constexpr int SHIFT = 0;
  __m512i mask;
  INLINE Code make(const Weight&, int32_t) { return {_mm512_set1_epi8(15)}; }
  INLINE void fetch(const Code&, const uint8_t* row, int64_t at, int count) { quern::fetch(row, at, count); }
  INLINE NoTables tables(const Code&, int64_t) { return {}; }
  INLINE __m512i codes(const Code& self, NoTables, __m512i bytes, int which, int64_t) {
    return _mm512_and_si512(which == 0 ? bytes : _mm512_srli_epi16(bytes, 4), self.mask);
  }
};

// Zero points of 16 rows for one group, as 16 x 4 equal bytes.
INLINE __m512i zero_bytes(const Weight& weight, int32_t row, int32_t rows, int32_t group) {
  if (weight.zeros == nullptr) return _mm512_set1_epi8(8);
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group;
  alignas(64) uint32_t zero[16];
  for (int i = 0; i < 16; ++i) {
    const int32_t at = weight.scale_stride == 0 ? 0 : row + (i < rows ? i : 0);
    zero[i] = 0x01010101u * (static_cast<uint32_t>(weight.zeros[static_cast<int64_t>(at / 8) * groups + group]) >> 4 * (at % 8) & 15);
  }
  return _mm512_load_si512(zero);
}

// Codes less their zero points, which change between groups; these are a multiple of 4 columns.
struct Values {
  const Weight& weight;
  int32_t row, rows;
  __m512i flip;
  int32_t group = -1;
  __m512i zeros;

  Values(const Weight& w, int32_t first_row, int32_t count, uint8_t bias)
      : weight(w), row(first_row), rows(count), flip(_mm512_set1_epi8(static_cast<char>(bias))) {}

  INLINE __m512i of(Values& self, __m512i codes, int32_t column) {
    const int32_t found = column / self.weight.group;
    if (found != self.group) {
      self.group = found;
      self.zeros = zero_bytes(self.weight, self.row, self.rows, found);
    }
    return _mm512_xor_si512(_mm512_sub_epi8(codes, self.zeros), self.flip);
  }
};

}  // namespace

const KindKernels integer4_avx512 = {multiply<Code>, nullptr, decode_nibbles<Values>};

}  // namespace quern
