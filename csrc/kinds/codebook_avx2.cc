// Codes that tables have values for; see rows_avx2-inl.h and codebook_avx512.cc.
#include "kinds/codebook-inl.h"
#include "kinds/panel_avx2-inl.h"
#include "kinds/rows_avx2-inl.h"

namespace quern {
namespace {

// A byte of ones for each bit that is set.
INLINE __m256i spread_bits(uint32_t bits) {
  const __m256i order = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)), order);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
}

template <int BITS>
struct Code {
  static constexpr int PER_BYTE = CODES<BITS>;
  static constexpr bool NARROW = false;
  static constexpr bool SQUARES = BITS == 4;
  __m256i low, high;  // entries of codes below 4, and from there on; where codes have 3 bits
  const uint8_t* codes;
  int32_t columns;

  INLINE Code make(const Weight& weight, int32_t row) {
    alignas(16) int8_t entries[16] = {};
    __builtin_memcpy(entries, table_of(weight, row, 0), 1 << BITS);
    const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(entries));
    return {_mm256_broadcastsi128_si256(table), _mm256_broadcastsi128_si256(_mm_srli_si128(table, 4)), codes_of(weight, row),
            weight.columns};
  }

  template <int TOKENS>
  INLINE void add(const Code& self, __m256i bytes, const Inputs& in, int64_t at, __m256i* sums, int64_t moved) {
    constexpr int WIDTH = 8 / PER_BYTE;
#pragma GCC unroll 4
    for (int which = 0; which < PER_BYTE; ++which) {
      const __m256i shifted = _mm256_srli_epi16(bytes, WIDTH * which);
      const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi8((1 << WIDTH) - 1));
      __m256i values = _mm256_shuffle_epi8(self.low, codes);
      if constexpr (BITS == 3) {
        const __m256i third = spread_bits(static_cast<uint32_t>(third_bits(self.codes, self.columns, at + moved, which)));
        values = _mm256_blendv_epi8(values, _mm256_shuffle_epi8(self.high, codes), third);
      }
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

// Four bits.
void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  decode_rows(part, flip, panel, [&](int32_t row, int32_t column) __attribute__((always_inline)) {
    const __m256i codes = nibbles_of(weight, row, column);
    const int32_t last = least(column + 31, weight.columns - 1);
    if (weight.table_group == 0 || column / weight.group == last / weight.group) {
      const int8_t* entries = table_of(weight, row, column / weight.group);
      const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries));
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

const KindKernels codebook2_avx2 = {rows<2>, nullptr, nullptr};
const KindKernels codebook3_avx2 = {rows<3>, nullptr, nullptr};
const KindKernels codebook4_avx2 = {rows<4>, nullptr, panel};

}  // namespace quern
