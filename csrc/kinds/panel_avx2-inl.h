// Decoding into panels, eight rows at a time; for <kind>_avx2.cc alone, without a guard or linkage.
#include "kernels/common_avx2.h"
#include "kernels/kernels.h"
#include "kinds/lanes_avx2-inl.h"

namespace quern {
namespace {

// 32 columns of eight rows, of which `v` has a register each, from column `column` of the matrix on; as far as they are of the part.
// `row`: the first of them, counted from that of the part, a multiple of 8.
INLINE void store_panel(__m256i* v, const Part& part, int32_t row, int32_t column, __m256i flips, int8_t* panel) {
  transpose(v);
  int8_t* to = panel + row / 16 * static_cast<int64_t>(part.blocks) * LANES + row % 16 / 8 * 32;
  const int32_t first = (column - part.first_column) / 4, count = (part.columns + 3) / 4;
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
    if (first + j >= 0 && first + j < count)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (first + j) * static_cast<int64_t>(LANES)), _mm256_xor_si256(v[j], flips));
}

// Of kinds whose codes lie along the rows: `values(row, column)` are 32 columns of a row of the matrix from a multiple of 32 on.
template <typename Values>
INLINE void decode_rows(const Part& part, uint8_t flip, int8_t* panel, const Values& values) {
  const __m256i flips = _mm256_set1_epi8(static_cast<char>(flip));
  const int32_t end = part.first_column + part.columns;
  for (int32_t row = 0; row < part.rows; row += 8)
    for (int32_t column = part.first_column / 32 * 32; column < end; column += 32) {
      __m256i v[8];
      for (int r = 0; r < 8; ++r) v[r] = values(part.first_row + least(row + r, part.rows - 1), column);
      store_panel(v, part, row, column, flips, panel);
    }
}

// 32 codes of four bits, which lie two a byte.
INLINE __m256i nibbles_of(const Weight& weight, int32_t row, int32_t column) {
  const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  const int64_t at = column / 2, left = weight.row_bytes - at;
  const __m128i bytes = left >= 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at))
                                   : _mm256_castsi256_si128(load_some(codes + at, left));
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
}

}  // namespace
}  // namespace quern
