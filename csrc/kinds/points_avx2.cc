// ggml's blocks of points of a grid with signs, and those of 32 columns with minimums; see eight_rows_avx2-inl.h.
#include "kinds/eight_rows_panel_avx2-inl.h"

namespace quern {
namespace {

using Q41Rows = Rows<Q41, 0, 3>;
using Q51Rows = Rows<Q51, 0, 2>;
// Sizes are at most 62: 2 * 2 * 62 * 127 = 31496.
using IQ2XXSRows = Rows<IQ2XXS, 0, 1, true>;
using IQ2XSRows = Rows<IQ2XS, 0, 1, true>;
using IQ2SRows = Rows<IQ2S, 0, 1, true>;
using IQ3XXSRows = Rows<IQ3XXS, 0, 1, true>;
using IQ3SRows = Rows<IQ3S, 0, 1, true>;

// A byte of ones for each bit that is set.
INLINE __m256i spread_bits(uint32_t bits) {
  const __m256i order = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)), order);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
}

INLINE uint32_t word(const uint8_t* at) {
  uint32_t bits;
  __builtin_memcpy(&bits, at, 4);
  return bits;
}

INLINE int64_t eight_sizes(const int8_t* table, int32_t point) {
  int64_t sizes;
  __builtin_memcpy(&sizes, table + 8 * point, 8);
  return sizes;
}

INLINE int32_t four_sizes(const int8_t* table, int32_t point) {
  int32_t sizes;
  __builtin_memcpy(&sizes, table + 4 * point, 4);
  return sizes;
}

INLINE __m256i with_signs(__m256i sizes, uint32_t signs) {
  return _mm256_sign_epi8(sizes, _mm256_or_si256(spread_bits(signs), _mm256_set1_epi8(1)));
}

// Four times seven signs to four times eight: the eighth makes the number of negative ones even.
INLINE uint32_t even_signs(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t signs = (a & 127) | (b & 127) << 8 | (c & 127) << 16 | (d & 127) << 24;
  uint32_t odd = signs ^ signs >> 4;
  odd ^= odd >> 2 & 0x3f3f3f3f;
  odd ^= odd >> 1 & 0x7f7f7f7f;
  return signs | (odd & 0x01010101) << 7;
}

INLINE uint32_t even_signs_of(uint32_t bits) { return even_signs(bits, bits >> 7, bits >> 14, bits >> 21); }

template <int I>
INLINE __m256i values(IQ2XXS, Register<I>, const uint8_t* b, const int8_t* table) {
  const uint8_t* at = b + 2 + 8 * I;
  const __m256i sizes = _mm256_setr_epi64x(eight_sizes(table, at[0]), eight_sizes(table, at[1]), eight_sizes(table, at[2]),
                                           eight_sizes(table, at[3]));
  return with_signs(sizes, even_signs_of(word(at + 4)));
}

template <int I>
INLINE __m256i values(IQ2XS, Register<I>, const uint8_t* b, const int8_t* table) {
  const uint32_t first = word(b + 2 + 8 * I), second = word(b + 6 + 8 * I);
  const __m256i sizes =
      _mm256_setr_epi64x(eight_sizes(table, first & 511), eight_sizes(table, first >> 16 & 511),
                         eight_sizes(table, second & 511), eight_sizes(table, second >> 16 & 511));
  return with_signs(sizes, even_signs(first >> 9, first >> 25, second >> 9, second >> 25));
}

template <int I>
INLINE __m256i values(IQ2S, Register<I>, const uint8_t* b, const int8_t* table) {
  const uint8_t* at = b + 2 + 4 * I;
  const int32_t high = b[66 + I];
  const __m256i sizes = _mm256_setr_epi64x(
      eight_sizes(table, at[0] | (high << 8 & 0x300)), eight_sizes(table, at[1] | (high << 6 & 0x300)),
      eight_sizes(table, at[2] | (high << 4 & 0x300)), eight_sizes(table, at[3] | (high << 2 & 0x300)));
  return with_signs(sizes, word(b + 34 + 4 * I));
}

template <int I>
INLINE __m256i values(IQ3XXS, Register<I>, const uint8_t* b, const int8_t* table) {
  const uint8_t* at = b + 2 + 8 * I;
  const __m256i sizes = _mm256_setr_epi32(four_sizes(table, at[0]), four_sizes(table, at[1]), four_sizes(table, at[2]),
                                          four_sizes(table, at[3]), four_sizes(table, at[4]), four_sizes(table, at[5]),
                                          four_sizes(table, at[6]), four_sizes(table, at[7]));
  return with_signs(sizes, even_signs_of(word(b + 66 + 4 * I)));
}

template <int I>
INLINE __m256i values(IQ3S, Register<I>, const uint8_t* b, const int8_t* table) {
  const uint8_t* at = b + 2 + 8 * I;
  const int32_t high = b[66 + I];
  const auto sizes_of = [&](int j) { return four_sizes(table, at[j] | (high << (8 - j) & 0x100)); };
  const __m256i sizes = _mm256_setr_epi32(sizes_of(0), sizes_of(1), sizes_of(2), sizes_of(3), sizes_of(4), sizes_of(5),
                                          sizes_of(6), sizes_of(7));
  return with_signs(sizes, word(b + 74 + 4 * I));
}

INLINE __m256i nibbles(const uint8_t* at) {
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  return _mm256_and_si256(_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), _mm256_set1_epi8(15));
}

INLINE __m256i values(Q41, Register<0>, const uint8_t* b) { return nibbles(b + 4); }

INLINE __m256i values(Q51, Register<0>, const uint8_t* b) {
  return _mm256_or_si256(nibbles(b + 8), _mm256_and_si256(spread_bits(word(b + 4)), _mm256_set1_epi8(16)));
}

struct AffineNumbers {
  __m256 d, m;
  template <int G>
  INLINE_MEMBER __m256 scale() const {
    return d;
  }
  template <int G>
  INLINE_MEMBER __m256 minimum() const {
    return m;
  }
};

template <int32_t BITS>
INLINE AffineNumbers numbers_of(Affine<BITS>, const Blocks& blocks) {
  const __m256i both = words_at(blocks, 0);
  return {lower_halves(both), upper_halves(both)};
}

// Scales of 2 s + 1 times d: s are fields of four bits, GROUP n in word n / EACH from bit STEP * (n % EACH) + FIRST on.
template <int WORDS, int EACH, int STEP, int FIRST>
struct OddNumbers {
  __m256i words[WORDS];
  __m256 d;
  template <int G>
  INLINE_MEMBER __m256 scale() const {
    constexpr int SHIFT = STEP * (G % EACH) + FIRST - 1;  // doubled
    const __m256i word = words[G / EACH];
    const __m256i twice = SHIFT < 0 ? _mm256_slli_epi32(word, 1) : _mm256_srli_epi32(word, SHIFT < 0 ? 0 : SHIFT);
    const __m256i odd = _mm256_or_si256(_mm256_and_si256(twice, _mm256_set1_epi32(30)), _mm256_set1_epi32(1));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(odd), d);
  }
};

using Words = OddNumbers<8, 1, 0, 28>;        // above the signs of each group
using Nibbles = OddNumbers<2, 8, 4, 0>;

template <typename Type>
INLINE __m256 unit_of(const Blocks& blocks) {
  return _mm256_mul_ps(halves_at(blocks, 0), _mm256_set1_ps(Type::UNIT));
}

INLINE Words numbers_of(IQ2XXS, const Blocks& blocks) {
  Words n;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m256i four[4];
    load_words(blocks, 2 + 16 * i, four);
    n.words[2 * i] = four[1];
    n.words[2 * i + 1] = four[3];
  }
  n.d = unit_of<IQ2XXS>(blocks);
  return n;
}

INLINE Words numbers_of(IQ3XXS, const Blocks& blocks) {
  Words n;
  load_words(blocks, 66, n.words);
  load_words(blocks, 82, n.words + 4);
  n.d = unit_of<IQ3XXS>(blocks);
  return n;
}

// The nibbles in the last eight bytes of a block.
template <typename Type>
INLINE Nibbles last_nibbles(const Blocks& blocks) {
  __m256i four[4];
  load_words(blocks, Type::BYTES - 16, four);
  return {{four[2], four[3]}, unit_of<Type>(blocks)};
}

INLINE Nibbles numbers_of(IQ2XS, const Blocks& blocks) { return last_nibbles<IQ2XS>(blocks); }
INLINE Nibbles numbers_of(IQ2S, const Blocks& blocks) { return last_nibbles<IQ2S>(blocks); }

INLINE Nibbles numbers_of(IQ3S, const Blocks& blocks) {
  const __m256i last = words_at(blocks, IQ3S::BYTES - 4);
  return {{last, last}, unit_of<IQ3S>(blocks)};
}

}  // namespace

const KindKernels q4_1_avx2 = {rows<Q41Rows>, nullptr, panel<Q41Rows>, numbers<Q41Rows>};
const KindKernels q5_1_avx2 = {rows<Q51Rows>, nullptr, panel<Q51Rows>, numbers<Q51Rows>};
const KindKernels iq2_xxs_avx2 = {rows<IQ2XXSRows>, nullptr, panel<IQ2XXSRows>, numbers<IQ2XXSRows>};
const KindKernels iq2_xs_avx2 = {rows<IQ2XSRows>, nullptr, panel<IQ2XSRows>, numbers<IQ2XSRows>};
const KindKernels iq2_s_avx2 = {rows<IQ2SRows>, nullptr, panel<IQ2SRows>, numbers<IQ2SRows>};
const KindKernels iq3_xxs_avx2 = {rows<IQ3XXSRows>, nullptr, panel<IQ3XXSRows>, numbers<IQ3XXSRows>};
const KindKernels iq3_s_avx2 = {rows<IQ3SRows>, nullptr, panel<IQ3SRows>, numbers<IQ3SRows>};

}  // namespace quern
