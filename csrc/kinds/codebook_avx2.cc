// Codes that tables have values for; see rows_avx2-inl.h and codebook_avx512.cc.
#include "kinds/codebook-inl.h"
#include "kinds/panel_avx2-inl.h"
#include "kinds/rows_avx2-inl.h"

namespace quern {
namespace {

// The entries of one table in the first bytes.
template <int BITS>
INLINE __m128i entries_of(const int8_t* table) {
  if constexpr (BITS == 4) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  if constexpr (BITS == 3) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table));
  return _mm_cvtsi32_si128(static_cast<int32_t>(word(reinterpret_cast<const uint8_t*>(table))));
}

template <int BITS>
struct Code {
  static constexpr int PER_BYTE = CODES<BITS>;
  static constexpr bool NARROW = false;
  static constexpr bool SQUARES = BITS != 2;
  __m256i table;         // where codes have three bits, entries c and c + 4 lie together
  const uint8_t* codes;
  const uint8_t* third;  // planes of third bits
  int64_t whole;         // bytes of lower bits whose planes are whole

  INLINE Code make(const Weight& weight, int32_t row) {
    __m128i table = entries_of<BITS>(table_of(weight, row, 0));
    if (BITS == 3) table = _mm_unpacklo_epi8(table, _mm_srli_si128(table, 4));
    const uint8_t* codes = codes_of(weight, row);
    return {_mm256_broadcastsi128_si256(table), codes, codes + low_bytes(weight.columns), weight.columns / PLANE_COLUMNS * 64};
  }

  // Bytes of ones where the third bits of plane `which` are set, from byte `at` of the lower bits on.
  INLINE __m256i third_of(const Code& self, const Inputs& in, int64_t at, int which) {
    if (at < self.whole && at % 64 <= 32) return spread_bits(word(self.third + at / 64 * 32 + at % 64 / 8 + 8 * which));
    return spread_bits(static_cast<uint32_t>(third_bits(self.codes, in.columns, at, which)));
  }

  template <int TOKENS>
  INLINE void add(const Code& self, __m256i bytes, const Inputs& in, int64_t at, __m256i* sums, int64_t moved) {
    constexpr int WIDTH = 8 / PER_BYTE, LEFT = BITS == 3 ? 1 : 0;
#pragma GCC unroll 4
    for (int which = 0; which < PER_BYTE; ++which) {
      const int right = WIDTH * which - LEFT;
      const __m256i shifted = right < 0 ? _mm256_slli_epi16(bytes, -right) : _mm256_srli_epi16(bytes, right);
      __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi8(((1 << WIDTH) - 1) << LEFT));
      if (BITS == 3) codes = _mm256_sub_epi8(codes, third_of(self, in, at + moved, which));
      const __m256i values = _mm256_shuffle_epi8(self.table, codes);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        const int8_t* x = PER_BYTE == 4 ? in.quarters + (4 * t + which) * in.quarter : in.halves + (2 * t + which) * in.half;
        sums[t] = _mm256_add_epi32(sums[t], products(values, load(x + at)));
      }
    }
  }
};

template <int BITS>
constexpr const KindKernels& SCALAR = BITS == 2 ? codebook2_scalar : BITS == 3 ? codebook3_scalar : codebook4_scalar;

template <int BITS>
void rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  // Registers of three bits must not reach from one set of planes into the next.
  const bool fits = BITS != 3 || in.group == 64 || in.group == 128 || in.group % PLANE_COLUMNS == 0;
  const bool whole = in.groups == 1 || (in.group % CODES<BITS> == 0 && fits);
  if (!whole || weight.table_group != 0) return SCALAR<BITS>.rows(weight, in, first, last, outputs);
  Inputs part = in;  // four tokens or one at a time, since more variants would take long to compile
  for (int32_t t = 0; t < in.tokens; t += part.tokens) {
    part.tokens = SMALL_CODE || in.tokens - t < 4 ? 1 : 4;
    part.halves = in.halves + 2 * t * in.half;
    part.quarters = in.quarters + 4 * t * in.quarter;
    part.scale = in.scale + static_cast<int64_t>(t) * in.groups;
    part.sums = in.sums + static_cast<int64_t>(t) * in.groups;
    float* to = outputs + t * in.rows;
    if constexpr (!SMALL_CODE)
      if (part.tokens == 4) by_group<Code<BITS>, 4>(weight, part, first, last, to);
    if (part.tokens == 1) by_group<Code<BITS>, 1>(weight, part, first, last, to);
  }
}

// 32 codes of a row from a multiple of 32 on.
template <int BITS>
INLINE __m256i codes_at(const Weight& weight, int32_t row, int32_t column) {
  if constexpr (BITS == 4) return nibbles_of(weight, row, column);
  const uint8_t* codes = codes_of(weight, row);
  const int64_t at = column / 4, left = low_bytes(weight.columns) - at;
  uint64_t bytes = 0;
  __builtin_memcpy(&bytes, codes + at, static_cast<size_t>(left < 8 ? left : 8));
  const __m256i order = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
  const __m256i fourfold = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<int64_t>(bytes)), order);
  const __m256i pairs = _mm256_blend_epi16(fourfold, _mm256_srli_epi16(fourfold, 4), 0xaa);
  const __m256i even = _mm256_and_si256(pairs, _mm256_set1_epi16(0x0003));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(pairs, 2), _mm256_set1_epi16(0x0300));
  const __m256i low = _mm256_or_si256(even, odd);
  if constexpr (BITS == 2) return low;
  uint32_t planes = 0;
  const uint8_t* plane = codes + low_bytes(weight.columns) + at / 64 * 32 + at % 64 / 8;
  const bool whole = (at / 64 + 1) * PLANE_COLUMNS <= weight.columns;
  for (int which = 0; which < 4; ++which)
    planes |= static_cast<uint32_t>(whole ? plane[8 * which] : third_bits(codes, weight.columns, at, which) & 255) << 8 * which;
  const __m256i each = _mm256_setr_epi32(0x01010101, 0x02020202, 0x04040404, 0x08080808, 0x10101010, 0x20202020, 0x40404040, INT32_MIN | 0x00808080);
  const __m256i third = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(planes)), each), each);
  return _mm256_or_si256(low, _mm256_and_si256(third, _mm256_set1_epi8(4)));
}

template <int BITS>
void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  decode_rows(part, flip, panel, [&](int32_t row, int32_t column) __attribute__((always_inline)) {
    const __m256i codes = codes_at<BITS>(weight, row, column);
    const int32_t last = least(column + 31, weight.columns - 1);
    if (weight.table_group == 0 || column / weight.group == last / weight.group) {
      const __m128i table = entries_of<BITS>(table_of(weight, row, column / weight.group));
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
    }
    alignas(32) uint8_t each[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), codes);
    for (int32_t c = column; c <= last; ++c)
      each[c - column] = static_cast<uint8_t>(table_of(weight, row, c / weight.group)[each[c - column]]);
    return load(each);
  });
}

}  // namespace

const KindKernels codebook2_avx2 = {rows<2>, nullptr, panel<2>};
const KindKernels codebook3_avx2 = {rows<3>, nullptr, panel<3>};
const KindKernels codebook4_avx2 = {rows<4>, nullptr, panel<4>};

}  // namespace quern
