// ggml's blocks of points of a grid with signs, and those of 32 columns with minimums; see eight_rows_avx2-inl.h.
#include "kinds/eight_rows_panel_avx2-inl.h"

namespace quern {
namespace {

using Q41Rows = Rows<Q41, 0, 3>;
using Q51Rows = Rows<Q51, 0, 2>;
// Sizes are at most 62: 2 * 2 * 62 * 127 = 31496.
using IQ2XXSRows = Rows<IQ2XXS, 0, 1>;
using IQ2XSRows = Rows<IQ2XS, 0, 1>;
using IQ2SRows = Rows<IQ2S, 0, 1>;
using IQ3XXSRows = Rows<IQ3XXS, 0, 1>;
using IQ3SRows = Rows<IQ3S, 0, 1>;

// Four points of eight columns: the numbers in `index` say which.
INLINE __m256i eight_sizes(const int8_t* table, const uint64_t* index) {
  const auto at = [&](int i) { return reinterpret_cast<const double*>(table + 8 * index[i]); };
  const __m128d low = _mm_loadh_pd(_mm_load_sd(at(0)), at(1)), high = _mm_loadh_pd(_mm_load_sd(at(2)), at(3));
  return _mm256_castpd_si256(_mm256_set_m128d(high, low));
}

// Eight points of four columns. Memory operands of sixteen bytes take fewer steps than inserting four.
INLINE __m256i four_sizes(const int8_t* table, const uint64_t* index) {
  __m128i half[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const auto at = [&](int i) __attribute__((always_inline)) { return table + 4 * index[4 * h + i]; };
    const auto both = [&](int i) __attribute__((always_inline)) {
      return _mm_unpacklo_epi32(_mm_loadu_si32(at(i)), _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(i + 1))));
    };
    half[h] = _mm_unpacklo_epi64(both(0), both(2));
  }
  return _mm256_set_m128i(half[1], half[0]);
}

// A byte that is negative for each bit that is set, and else positive.
INLINE __m256i signs_of(uint32_t bits) { return _mm256_or_si256(spread_bits(bits), _mm256_set1_epi8(1)); }

// Bytes of seven signs to bytes of eight: the eighth makes the number of negative ones even.
INLINE __m256i even_signs(__m256i seven) {
  const __m256i odd = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(seven, 4), _mm256_set1_epi8(15));
  return _mm256_xor_si256(seven, _mm256_xor_si256(_mm256_shuffle_epi8(odd, seven), _mm256_shuffle_epi8(odd, high)));
}

INLINE __m256i masked(__m256i words, int32_t mask) { return _mm256_and_si256(words, _mm256_set1_epi32(mask)); }

// Four fields of seven bits to four bytes.
INLINE __m256i four_sevens(__m256i words) {
  const __m256i two = _mm256_or_si256(masked(words, 0x3fff), _mm256_slli_epi32(masked(words, 0xfffc000), 2));
  return _mm256_or_si256(masked(two, 0x007f007f), _mm256_slli_epi32(masked(two, 0x3f803f80), 1));
}

// What is worked out for a super-block of all eight rows at once: eight signs of each of four points, by group of 32 columns and row.
struct Signs {
  alignas(32) uint32_t of[8][ROWS];
  template <int I>
  INLINE_MEMBER void set(__m256i seven) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(of[I]), even_signs(seven));
  }
};

// Numbers of points that have more bits than lie together, by row.
template <int COUNT>
struct Indices {
  alignas(32) uint16_t of[ROWS][COUNT];
};

template <int I, typename Numbers>
INLINE __m256i values(IQ2XXS, Register<I>, const Blocks& blocks, const Numbers&, int row) {
  const uint8_t* at = blocks.row[row] + 2 + 8 * I;
  const uint64_t index[4] = {at[0], at[1], at[2], at[3]};
  return eight_sizes(blocks.table, index);
}

template <int I, typename Numbers>
INLINE __m256i values(IQ2XS, Register<I>, const Blocks& blocks, const Numbers&, int row) {
  uint16_t at[4];
  __builtin_memcpy(at, blocks.row[row] + 2 + 8 * I, sizeof at);
  const uint64_t index[4] = {at[0] & 511u, at[1] & 511u, at[2] & 511u, at[3] & 511u};
  return eight_sizes(blocks.table, index);
}

template <int I, typename Numbers>
INLINE __m256i values(IQ2S, Register<I>, const Blocks& blocks, const Numbers& numbers, int row) {
  const uint16_t* at = numbers.indices.of[row] + 4 * I;
  const uint64_t index[4] = {at[0], at[1], at[2], at[3]};
  return eight_sizes(blocks.table, index);
}

template <int I, typename Numbers>
INLINE __m256i values(IQ3XXS, Register<I>, const Blocks& blocks, const Numbers&, int row) {
  const uint8_t* at = blocks.row[row] + 2 + 8 * I;
  const uint64_t index[8] = {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]};
  return four_sizes(blocks.table, index);
}

template <int I, typename Numbers>
INLINE __m256i values(IQ3S, Register<I>, const Blocks& blocks, const Numbers& numbers, int row) {
  const uint16_t* at = numbers.indices.of[row] + 8 * I;
  const uint64_t index[8] = {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]};
  return four_sizes(blocks.table, index);
}

template <typename Type, int I, typename Numbers>
INLINE __m256i signs(Type, Register<I>, const Blocks&, const Numbers& numbers, int row) {
  return signs_of(numbers.signs.of[I][row]);
}

template <int I, typename Numbers>
INLINE __m256i signs(IQ2SRows, Register<I>, const Blocks& blocks, const Numbers&, int row) {
  return signs_of(word(blocks.row[row] + 34 + 4 * I));
}

template <int I, typename Numbers>
INLINE __m256i signs(IQ3SRows, Register<I>, const Blocks& blocks, const Numbers&, int row) {
  return signs_of(word(blocks.row[row] + 74 + 4 * I));
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

// Above the signs of each group.
struct Words : OddNumbers<8, 1, 0, 28> {
  Signs signs;
};

using Nibbles = OddNumbers<2, 8, 4, 0>;

struct SignedNibbles : Nibbles {
  Signs signs;
};

template <int COUNT>
struct IndexedNibbles : Nibbles {
  Indices<COUNT> indices;
};

template <typename Type>
INLINE __m256 unit_of(const Blocks& blocks) {
  return _mm256_mul_ps(halves_at(blocks, 0), _mm256_set1_ps(Type::UNIT));
}

INLINE void set_signs(Words& n) {
  n.signs.set<0>(four_sevens(n.words[0]));
  n.signs.set<1>(four_sevens(n.words[1]));
  n.signs.set<2>(four_sevens(n.words[2]));
  n.signs.set<3>(four_sevens(n.words[3]));
  n.signs.set<4>(four_sevens(n.words[4]));
  n.signs.set<5>(four_sevens(n.words[5]));
  n.signs.set<6>(four_sevens(n.words[6]));
  n.signs.set<7>(four_sevens(n.words[7]));
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
  set_signs(n);
  n.d = unit_of<IQ2XXS>(blocks);
  return n;
}

INLINE Words numbers_of(IQ3XXS, const Blocks& blocks) {
  Words n;
  load_words(blocks, 66, n.words);
  load_words(blocks, 82, n.words + 4);
  set_signs(n);
  n.d = unit_of<IQ3XXS>(blocks);
  return n;
}

// The nibbles in the last eight bytes of a block.
template <typename Type>
INLINE void last_nibbles(const Blocks& blocks, Nibbles& n) {
  __m256i four[4];
  load_words(blocks, Type::BYTES - 16, four);
  n.words[0] = four[2];
  n.words[1] = four[3];
  n.d = unit_of<Type>(blocks);
}

// Of four points of nine bits, two a word, which have seven signs above them.
template <int I>
INLINE void set_signs(SignedNibbles& n, __m256i first, __m256i second) {
  const __m256i low = _mm256_or_si256(masked(_mm256_srli_epi32(first, 9), 0x7f), masked(_mm256_srli_epi32(first, 17), 0x7f00));
  const __m256i high = _mm256_or_si256(masked(_mm256_slli_epi32(second, 7), 0x7f0000), masked(_mm256_srli_epi32(second, 1), 0x7f000000));
  n.signs.set<I>(_mm256_or_si256(low, high));
}

template <int I>
INLINE void set_signs_from(SignedNibbles& n, const Blocks& blocks) {
  if constexpr (I < 8) {
    __m256i four[4];
    load_words(blocks, 2 + 8 * I, four);
    set_signs<I>(n, four[0], four[1]);
    set_signs<I + 1>(n, four[2], four[3]);
    set_signs_from<I + 2>(n, blocks);
  }
}

INLINE SignedNibbles numbers_of(IQ2XS, const Blocks& blocks) {
  SignedNibbles n;
  set_signs_from<0>(n, blocks);
  last_nibbles<IQ2XS>(blocks, n);
  return n;
}

// Sixteen numbers of points: a byte each, and further bits of them, EACH in a byte of which the lowest belong to the first.
template <int EACH>
INLINE __m256i joined(const uint8_t* low, const uint8_t* high) {
  constexpr int BITS = 8 / EACH, BYTES = 16 / EACH;
  int32_t bytes = 0;
  __builtin_memcpy(&bytes, high, BYTES);
  const __m256i order = EACH == 4 ? _mm256_setr_epi8(0, -1, 0, -1, 0, -1, 0, -1, 1, -1, 1, -1, 1, -1, 1, -1, 2, -1, 2, -1, 2, -1, 2, -1, 3, -1, 3, -1, 3, -1, 3, -1)
                                  : _mm256_setr_epi8(0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
  const __m256i left = EACH == 4 ? _mm256_setr_epi16(256, 64, 16, 4, 256, 64, 16, 4, 256, 64, 16, 4, 256, 64, 16, 4)
                                 : _mm256_setr_epi16(256, 128, 64, 32, 16, 8, 4, 2, 256, 128, 64, 32, 16, 8, 4, 2);
  const __m256i spread = _mm256_mullo_epi16(_mm256_shuffle_epi8(_mm256_set1_epi32(bytes), order), left);
  const __m256i further = _mm256_and_si256(spread, _mm256_set1_epi16(((1 << BITS) - 1) << 8));
  return _mm256_or_si256(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))), further);
}

template <int EACH, int COUNT>
INLINE void set_indices(const Blocks& blocks, Indices<COUNT>& indices) {
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i += 16)
      _mm256_store_si256(reinterpret_cast<__m256i*>(indices.of[r] + i), joined<EACH>(blocks.row[r] + 2 + i, blocks.row[r] + 66 + i / EACH));
}

INLINE IndexedNibbles<32> numbers_of(IQ2S, const Blocks& blocks) {
  IndexedNibbles<32> n;
  set_indices<4>(blocks, n.indices);
  last_nibbles<IQ2S>(blocks, n);
  return n;
}

INLINE IndexedNibbles<64> numbers_of(IQ3S, const Blocks& blocks) {
  IndexedNibbles<64> n;
  set_indices<8>(blocks, n.indices);
  n.words[0] = n.words[1] = words_at(blocks, IQ3S::BYTES - 4);
  n.d = unit_of<IQ3S>(blocks);
  return n;
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
