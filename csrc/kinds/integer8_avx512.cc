// 8-bit integers; see rows_avx512-inl.h.
#include "kinds/panels_avx512-inl.h"
#include "kinds/rows_avx512-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 1, REGISTERS = 1;
  static constexpr int SHIFT = 128;
  __m512i flip;
  INLINE Code make(const Weight&, int32_t) { return {_mm512_set1_epi8(-128)}; }
  INLINE void fetch(const Code&, const uint8_t* row, int64_t at, int count) { quern::fetch(row, at, count); }
  INLINE NoTables tables(const Code&, int64_t) { return {}; }
  INLINE __m512i codes(const Code& self, NoTables, __m512i bytes, int, int64_t) { return _mm512_xor_si512(bytes, self.flip); }
};

void decode_bytes(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(flip));
  const int32_t end = (part.columns + 3) / 4;
  for (int32_t r = 0; r < part.rows; r += 16) {
    int8_t* to = panel + static_cast<int64_t>(r / 16) * part.blocks * LANES;
    for (int32_t c = 0; c < part.columns; c += 64) {
      __m512i v[16];
      load_rows(weight, part.first_row + r, least(part.rows - r, 16), part.first_column + c, part.columns - c, v);
      transpose(v);
      const int32_t count = least(end - c / 4, 16);
      for (int32_t b = 0; b < count; ++b) _mm512_storeu_si512(to + (c / 4 + b) * LANES, _mm512_xor_si512(v[b], bias));
    }
  }
}

}  // namespace

const KindKernels integer8_avx512 = {multiply<Code>, nullptr, decode_bytes};

}  // namespace quern
