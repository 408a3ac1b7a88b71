// Decoding of codes that lie along the rows into panels, 16 rows at a time.
// No include guard and no linkage: for <kind>_avx512.cc alone.
#include "kernels/common_avx512.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

// 16 rows of up to 64 bytes each; rows past the end are those of the first.
INLINE void load_rows(const Weight& weight, int32_t row, int32_t rows, int64_t at, int64_t count, __m512i* v) {
  const uint8_t* base = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes + at;
  const __mmask64 some = first_bytes(count);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_epi8(some, base + (i < rows ? i : 0) * weight.row_bytes);
}

// The double word of each row holds 8 codes; registers of the first and the last four, a code a byte.
INLINE __m512i spread(__m512i codes, int which) {
  // vpmultishiftqb picks for every byte the 8 bits from some bit of its quadword on.
  const int64_t first = 0x2c2824200c080400;
  const __m512i from = _mm512_set1_epi64(which == 0 ? first : first + 0x1010101010101010);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(from, codes), _mm512_set1_epi8(15));
}

// 4-bit codes, 128 columns of 16 rows at a time. `Values(weight, first row, rows, flip)` makes bytes of a register of codes, given
// its first column. The part's columns are whole registers, but for the last at the end of the rows.
template <typename Values>
void decode_nibbles(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const int32_t end = (part.columns + 3) / 4;
  for (int32_t r = 0; r < part.rows; r += 16) {
    const int32_t row = part.first_row + r, rows = least(part.rows - r, 16);
    Values values(weight, row, rows, flip);
    int8_t* to = panel + static_cast<int64_t>(r / 16) * part.blocks * LANES;
    // A byte holds two columns, so a part may begin in the middle of a quadword; it is read from there on.
    for (int32_t c = 0; c < part.columns; c += 128) {
      __m512i v[16];
      const int64_t bytes = (least(part.columns - c, 128) + 1) / 2;
      load_rows(weight, row, rows, (part.first_column + c) / 2, bytes, v);
      transpose(v);
      const int32_t count = least(end - c / 4, 32);
      for (int32_t b = 0; b < count; ++b) {
        const __m512i codes = spread(v[b / 2], b % 2);
        _mm512_storeu_si512(to + (c / 4 + b) * LANES, Values::of(values, codes, part.first_column + c + 4 * b));
      }
    }
  }
}

}  // namespace
}  // namespace quern
