// Codes that tables have values for, looked up by vpshufb; a third bit picks between two tables by a mask. Values are shifted by
// 128; see rows_avx512-inl.h. Codes of two bits meet the inputs of every fourth column.
#include "kinds/codebook-inl.h"
#include "kinds/panels_avx512-inl.h"
#include "kinds/rows_avx512-inl.h"

namespace quern {
namespace {

struct Bytes {
  uint8_t at[64];
};

constexpr Bytes first_bytes_of() {
  Bytes bytes = {};
  for (int i = 0; i < 64; ++i) bytes.at[i] = static_cast<uint8_t>(i);
  return bytes;
}

alignas(64) constexpr Bytes FIRST_BYTES = first_bytes_of();  // 0, 1, 2 ...

struct Tables {
  __m512i low, high;   // of codes below 4, and from there on; where codes have 3 bits
  __mmask64 third[4];  // which codes are, by plane
};

// The entries of one table, exclusive-or `flip`, in the first bytes.
template <int BITS>
INLINE __m128i entries_of(const int8_t* table) {
  if constexpr (BITS == 4) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  if constexpr (BITS == 3) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table));
  int32_t four;
  __builtin_memcpy(&four, table, 4);
  return _mm_cvtsi32_si128(four);
}

template <int BITS>
INLINE Tables split_table(__m512i table, uint8_t flip) {
  table = _mm512_xor_si512(table, _mm512_set1_epi8(static_cast<char>(flip)));
  return {table, _mm512_bsrli_epi128(table, BITS == 3 ? 4 : 0), {}};
}

// Tables for a register of codes from byte `at` of a row on. A lane of 16 bytes has 32 or 64 columns, all of one group.
template <int BITS>
INLINE Tables tables_at(const Weight& weight, int32_t row, int64_t at, uint8_t flip) {
  if (weight.table_group == 0) return split_table<BITS>(_mm512_broadcast_i32x4(entries_of<BITS>(table_of(weight, row, 0))), flip);
  __m128i lanes[4];
  for (int lane = 0; lane < 4; ++lane) {
    const int64_t column = (at + 16 * lane) * CODES<BITS>;
    lanes[lane] = entries_of<BITS>(table_of(weight, row, least(static_cast<int32_t>(column), weight.columns - 1) / weight.group));
  }
  __m512i all = _mm512_castsi128_si512(lanes[0]);
  all = _mm512_inserti32x4(all, lanes[1], 1);
  all = _mm512_inserti32x4(all, lanes[2], 2);
  return split_table<BITS>(_mm512_inserti32x4(all, lanes[3], 3), flip);
}

// Third bits of the codes in the register from byte `at` of a row on.
INLINE void load_third(Tables& tables, const uint8_t* row, int32_t columns, int64_t at) {
  if (at * CODES<3> + PLANE_COLUMNS <= columns) {
    const uint8_t* from = row + low_bytes(columns) + at / 2;
    for (int plane = 0; plane < 4; ++plane) __builtin_memcpy(&tables.third[plane], from + 8 * plane, 8);
  } else {
    for (int plane = 0; plane < 4; ++plane) tables.third[plane] = third_bits(row, columns, at, plane);
  }
}

// What the codes of plane `which` in a register stand for.
template <int BITS>
INLINE __m512i look_up(const Tables& tables, __m512i bytes, int which) {
  constexpr int WIDTH = 8 / CODES<BITS>;
  const __m512i shifted = which == 0 ? bytes : _mm512_srli_epi16(bytes, static_cast<unsigned>(WIDTH * which));
  const __m512i codes = _mm512_and_si512(shifted, _mm512_set1_epi8((1 << WIDTH) - 1));
  const __m512i found = _mm512_shuffle_epi8(tables.low, codes);
  if constexpr (BITS != 3) return found;
  return _mm512_mask_shuffle_epi8(found, tables.third[which], tables.high, codes);
}

// OWN: groups have tables of their own, in lanes. Else a table of a row fills a register for vpermb, which looks at the lower six
// bits of a byte: it is repeated so that a code may lie there with whatever beside it.
template <int BITS, bool OWN>
struct Code {
  static constexpr int PER_BYTE = CODES<BITS>, REGISTERS = CODES<BITS>;
  static constexpr int SHIFT = 128;
  static constexpr int PLACES = BITS == 4 ? 1 : 3;  // of a code in six bits
  __m512i low[PLACES], high[BITS == 3 ? PLACES : 1];  // of codes below 4, and from there on
  const Weight* weight;
  const uint8_t* codes_of_row;
  int32_t row, columns;

  INLINE Code make(const Weight& weight, int32_t row) {
    Code self;
    self.weight = &weight;
    self.codes_of_row = codes_of(weight, row);
    self.row = row;
    self.columns = weight.columns;
    if constexpr (OWN) return self;
    const __m512i lanes = tables_at<BITS>(weight, row, 0, 128).low;
    self.low[0] = lanes;
    if constexpr (BITS == 4) return self;
    const __m512i last = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
    __m512i place = _mm512_load_si512(&FIRST_BYTES);
#pragma GCC unroll 3
    for (int i = 0; i < PLACES; ++i) {
      const __m512i codes = _mm512_and_si512(place, last);
      self.low[i] = _mm512_shuffle_epi8(lanes, codes);
      if constexpr (BITS == 3) self.high[i] = _mm512_shuffle_epi8(lanes, _mm512_or_si512(codes, four));
      place = _mm512_srli_epi16(place, 2);
    }
    return self;
  }
  INLINE void fetch(const Code& self, const uint8_t* row, int64_t at, int count) {
    quern::fetch(row, at, count);
    if constexpr (BITS == 3) quern::fetch(row + low_bytes(self.columns), at / 2, count / 2);
  }
  INLINE Tables tables(const Code& self, int64_t at) {
    Tables found;
    if constexpr (OWN) found = tables_at<BITS>(*self.weight, self.row, at, 128);
    if constexpr (BITS == 3) load_third(found, self.codes_of_row, self.columns, at);
    return found;
  }
  INLINE __m512i codes(const Code& self, const Tables& tables, __m512i bytes, int which, int64_t) {
    if constexpr (OWN) return look_up<BITS>(tables, bytes, which);
    // The last code of a byte is moved to where the last table finds it.
    const __m512i index = which < PLACES ? bytes : _mm512_srli_epi16(bytes, 8 - BITS_OF_PLANE - 2 * (PLACES - 1));
    const int place = which < PLACES ? which : PLACES - 1;
    const __m512i found = _mm512_permutexvar_epi8(index, self.low[place]);
    if constexpr (BITS != 3) return found;
    return _mm512_mask_permutexvar_epi8(found, tables.third[which], index, self.high[BITS == 3 ? place : 0]);
  }

 private:
  static constexpr int BITS_OF_PLANE = BITS == 4 ? 4 : 2;
};

// Four, two or one token at a time, since more variants would take long to compile; of tables of groups one.
template <int BITS, bool OWN>
void by_tokens(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  using C = Code<BITS, OWN>;
  Inputs part = in;
  for (int32_t t = 0; t < in.tokens; t += part.tokens) {
    const int32_t left = in.tokens - t;
    part.tokens = OWN || left == 1 ? 1 : left < 4 ? 2 : 4;
    part.halves = in.halves + 2 * t * in.half;
    part.quarters = in.quarters + 4 * t * in.quarter;
    part.scale = in.scale + static_cast<int64_t>(t) * in.groups;
    part.sums = in.sums + static_cast<int64_t>(t) * in.groups;
    float* to = outputs + t * in.rows;
    if constexpr (!OWN) {
      if (part.tokens == 4) by_group<C, 4>(weight, part, first, last, to);
      if (part.tokens == 2) by_group<C, 2>(weight, part, first, last, to);
    }
    if (part.tokens == 1) by_group<C, 1>(weight, part, first, last, to);
  }
}

template <int BITS>
constexpr const KindKernels& SCALAR = BITS == 2 ? codebook2_scalar : BITS == 3 ? codebook3_scalar : codebook4_scalar;

template <int BITS>
void rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  const int32_t bytes = in.group % CODES<BITS> == 0 ? in.group / CODES<BITS> : 0;
  const bool whole = in.groups == 1 || bytes == 8 || bytes == 16 || bytes == 32 || bytes == 64;
  // Groups that do not begin where planes do, and lanes with several tables, are rare enough for the scalar version.
  if (!whole || (weight.table_group != 0 && bytes % 16 != 0)) return SCALAR<BITS>.rows(weight, in, first, last, outputs);
  if (weight.table_group != 0) return by_tokens<BITS, true>(weight, in, first, last, outputs);
  by_tokens<BITS, false>(weight, in, first, last, outputs);
}

// Planes of bytes to columns in order: double word d of lane l of register k has the columns CODES * 16 * l + 16 * k + 4 * d on.
template <int BITS>
INLINE void interleave(const __m512i* planes, __m512i* columns) {
  if constexpr (CODES<BITS> == 2) {
    columns[0] = _mm512_unpacklo_epi8(planes[0], planes[1]);
    columns[1] = _mm512_unpackhi_epi8(planes[0], planes[1]);
  } else {
    const __m512i low01 = _mm512_unpacklo_epi8(planes[0], planes[1]), high01 = _mm512_unpackhi_epi8(planes[0], planes[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(planes[2], planes[3]), high23 = _mm512_unpackhi_epi8(planes[2], planes[3]);
    columns[0] = _mm512_unpacklo_epi16(low01, low23);
    columns[1] = _mm512_unpackhi_epi16(low01, low23);
    columns[2] = _mm512_unpacklo_epi16(high01, high23);
    columns[3] = _mm512_unpackhi_epi16(high01, high23);
  }
}

template <int BITS>
void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* out) {
  constexpr int PLANES = CODES<BITS>, COLUMNS = 64 * PLANES;
  const bool torn = weight.table_group != 0 && weight.group % (16 * PLANES) != 0;
  if (part.first_column % COLUMNS != 0 || torn) return SCALAR<BITS>.panel(weight, part, flip, out);
  const int32_t end = (part.columns + 3) / 4;
  for (int32_t r = 0; r < part.rows; r += 16) {
    int8_t* to = out + static_cast<int64_t>(r / 16) * part.blocks * LANES;
    for (int32_t c = 0; c < part.columns; c += COLUMNS) {
      const int64_t at = (part.first_column + c) / PLANES;
      const __mmask64 some = first_bytes((weight.columns + PLANES - 1) / PLANES - at);
      __m512i found[PLANES][16];
      for (int i = 0; i < 16; ++i) {
        const int32_t row = part.first_row + r + (r + i < part.rows ? i : 0);
        const uint8_t* codes = codes_of(weight, row);
        const __m512i bytes = _mm512_maskz_loadu_epi8(some, codes + at);
        Tables tables = tables_at<BITS>(weight, row, at, flip);
        if constexpr (BITS == 3) load_third(tables, codes, weight.columns, at);
        __m512i planes[PLANES], columns[PLANES];
#pragma GCC unroll 4
        for (int which = 0; which < PLANES; ++which)
          planes[which] = look_up<BITS>(tables, bytes, which);
        interleave<BITS>(planes, columns);
#pragma GCC unroll 4
        for (int k = 0; k < PLANES; ++k) found[k][i] = columns[k];
      }
      for (int k = 0; k < PLANES; ++k) {
        transpose(found[k]);
        for (int n = 0; n < 16; ++n) {
          const int32_t block = c / 4 + n / 4 * 4 * PLANES + 4 * k + n % 4;
          if (block < end) _mm512_storeu_si512(to + static_cast<int64_t>(block) * LANES, found[k][n]);
        }
      }
    }
  }
}

}  // namespace

const KindKernels codebook2_avx512 = {rows<2>, nullptr, panel<2>};
const KindKernels codebook3_avx512 = {rows<3>, nullptr, panel<3>};
const KindKernels codebook4_avx512 = {rows<4>, nullptr, panel<4>};

}  // namespace quern
