// Products of eight rows and few tokens, for kinds whose scales lie among their codes in super-blocks: lanes are rows, so the
// sums of a group of eight rows are added to eight outputs at once, and a register of inputs meets eight rows.
//
// No include guard and no linkage: for the AVX2 files of such kinds. A type says, beside what superblock-inl.h wants,
//   OFFSET  what the registers of codes are greater than the codes by, so that they are unsigned; or SIGNED
//   EXACT   how often two sums of two products can be added in 16 bits
//   values(Type, Register<I>, block)  the codes of columns 32 * I ... of a super-block; of types with points the sizes, by
//           values(Type, Register<I>, blocks, numbers, row), and signs(the same), bytes below zero and others above
//   numbers_of(Type, blocks)  a struct of the scales of a super-block of eight rows, with scale<G>() and, where the type has
//           minimums, minimum<G>(): whole numbers, and d and d_min
#include "kernels/common_avx2.h"
#include "kinds/kinds.h"
#include "kinds/lanes_avx2-inl.h"
#include "kinds/superblock-inl.h"

namespace quern {
namespace {

#define INLINE_MEMBER __attribute__((always_inline)) inline
// A super-block of each of eight rows.
struct Blocks {
  const uint8_t* row[ROWS];
  const int8_t* table;  // of types with points
};

// The sizes of points. Of four columns each, sixteen bytes are read: a copy of them goes on behind its end.
template <typename Type>
struct Table {
  static constexpr bool COPIED = Type::WIDTH == 4;
  alignas(32) int8_t copy[COPIED ? Type::POINTS * Type::WIDTH + 16 : 1];
  const int8_t* at;

  INLINE_MEMBER explicit Table(const Weight& weight) : at(COPIED ? copy : weight.table) {
    if (COPIED) __builtin_memcpy(copy, weight.table, static_cast<size_t>(Type::POINTS * Type::WIDTH));
  }
};

// Those `offset` bytes behind the beginning of `rows` rows; the last of them again where there are fewer than eight.
INLINE Blocks blocks_at(const Weight& weight, const int8_t* table, int32_t row, int32_t rows, int64_t offset) {
  Blocks blocks;
  for (int r = 0; r < ROWS; ++r) blocks.row[r] = blocks_of(weight, row + least(r, rows - 1)) + offset;
  blocks.table = table;
  return blocks;
}

// A type of superblock-inl.h, with what is said above of its registers.
template <typename Base, int32_t OFFSET_, int EXACT_, bool SIGNED_ = false>
struct Rows : Base {
  static constexpr int32_t OFFSET = OFFSET_;
  static constexpr int EXACT = EXACT_;
  static constexpr bool SIGNED = SIGNED_;
};

// Columns 32 * I ... of a super-block.
template <int I>
struct Register {};

// Numbers of a row's register: those of points are sizes, which have signs.
struct Values {
  __m256i codes, signs;
};

template <typename Type, int I, typename Numbers>
INLINE Values values_of(const Blocks& blocks, const Numbers& numbers, int row) {
  if constexpr (Type::POINTS != 0) {
    return {values(Type{}, Register<I>{}, blocks, numbers, row), signs(Type{}, Register<I>{}, blocks, numbers, row)};
  } else {
    const __m256i codes = values(Type{}, Register<I>{}, blocks.row[row]);
    return {Type::SIGNED ? _mm256_abs_epi8(codes) : codes, codes};
  }
}

// Sums of two neighbouring products in 16 bits.
template <typename Type>
INLINE __m256i pair_products(const Values& v, __m256i inputs) {
  constexpr bool SIGNS = Type::SIGNED || Type::POINTS != 0;
  return _mm256_maddubs_epi16(v.codes, SIGNS ? _mm256_sign_epi8(inputs, v.signs) : inputs);
}

// outputs of eight rows += columns 32 * I ... of a super-block. `at`: its first group.
template <typename Type, int I, int TOKENS, typename Numbers>
INLINE void add_register(const Blocks& blocks, const Numbers& numbers, const Inputs& in, int32_t column, const float (*totals)[16],
                         __m256* out, __m256* low) {
  constexpr int EACH = 32 / Type::GROUP, G = I * EACH;
  Values codes[ROWS];
#pragma GCC unroll 8
  for (int r = 0; TOKENS > 1 && r < ROWS; ++r) codes[r] = values_of<Type, I>(blocks, numbers, r);
  __m256 ws[EACH], least[EACH];
  ws[0] = numbers.template scale<G>();
  if constexpr (EACH == 2) ws[1] = numbers.template scale<G + 1>();
  if constexpr (Type::MINIMUMS) {
    least[0] = numbers.template minimum<G>();
    if constexpr (EACH == 2) least[1] = numbers.template minimum<G + 1>();
  }
#pragma GCC unroll 4
  for (int t = 0; t < TOKENS; ++t) {
    const __m256i x = load(in.values + t * in.stride + column + 32 * I);
    __m256i v[ROWS], found[2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)  // one after the other, as registers are few
      v[r] = pair_products<Type>(TOKENS > 1 ? codes[r] : values_of<Type, I>(blocks, numbers, r), x);
    add_lanes<Type::EXACT, Type::GROUP>(v, found);
    const int64_t at = static_cast<int64_t>(t) * in.groups + column / Type::GROUP + G;
#pragma GCC unroll 2
    for (int g = 0; g < EACH; ++g) {
      if (Type::OFFSET != 0) found[g] = _mm256_sub_epi32(found[g], _mm256_set1_epi32(Type::OFFSET * in.sums[at + g]));
      out[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found[g]), _mm256_mul_ps(ws[g], _mm256_set1_ps(in.scale[at + g])), out[t]);
      if (Type::MINIMUMS) low[t] = _mm256_fmadd_ps(least[g], _mm256_set1_ps(totals[t][G + g]), low[t]);
    }
  }
}

template <typename Type, int TOKENS>
INLINE void add_block(const Blocks& blocks, const Inputs& in, int32_t column, __m256* out, __m256* low) {
  constexpr int GROUPS = Type::COLUMNS / Type::GROUP;
  alignas(32) float totals[TOKENS][16];
  for (int t = 0; Type::MINIMUMS && t < TOKENS; ++t) {
    const int64_t at = static_cast<int64_t>(t) * in.groups + column / Type::GROUP;
    for (int g = 0; g + 8 <= GROUPS; g += 8)
      _mm256_store_ps(totals[t] + g, _mm256_mul_ps(_mm256_cvtepi32_ps(load(in.sums + at + g)), _mm256_loadu_ps(in.scale + at + g)));
    if (GROUPS == 1) totals[t][0] = static_cast<float>(in.sums[at]) * in.scale[at];
  }
  const auto numbers = numbers_of(Type{}, blocks);
  add_register<Type, 0, TOKENS>(blocks, numbers, in, column, totals, out, low);
  if constexpr (Type::COLUMNS == SUPER) {
    add_register<Type, 1, TOKENS>(blocks, numbers, in, column, totals, out, low);
    add_register<Type, 2, TOKENS>(blocks, numbers, in, column, totals, out, low);
    add_register<Type, 3, TOKENS>(blocks, numbers, in, column, totals, out, low);
    add_register<Type, 4, TOKENS>(blocks, numbers, in, column, totals, out, low);
    add_register<Type, 5, TOKENS>(blocks, numbers, in, column, totals, out, low);
    add_register<Type, 6, TOKENS>(blocks, numbers, in, column, totals, out, low);
    add_register<Type, 7, TOKENS>(blocks, numbers, in, column, totals, out, low);
  }
}

// What is fetched into the L2 cache while a super-block of eight rows is computed. Short rows: as many bytes of the next eight rows,
// one after the other as they lie in memory, which is read so at .85 of the speed of a pure read, at .65 in eight places. Of
// long ones so much would be forgotten until it is used: a later super-block of each row, behind the end those of the next rows.
struct Ahead {
  int64_t row, distance;
  bool together;

  INLINE_MEMBER explicit Ahead(int64_t row_bytes)
      : row(row_bytes), distance(row_bytes < 1536 ? row_bytes : 1536), together(ROWS * row_bytes <= 40 << 10) {}

  template <int64_t BYTES>
  INLINE_MEMBER void fetch(const Blocks& blocks, int64_t at) const {
    if (together) {
      const char* next = reinterpret_cast<const char*>(blocks.row[0]) + ROWS * row + (ROWS - 1) * at;
      for (int64_t i = 0; i < ROWS * BYTES; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
      return;
    }
    const int64_t far = at + distance < row ? distance : distance + (ROWS - 1) * row;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int64_t i = 0; i < BYTES; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(blocks.row[r] + far + i), _MM_HINT_T1);
  }
};

template <typename Type, int TOKENS>
void multiply_rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  const Ahead ahead(weight.row_bytes);
  const Table<Type> table(weight);
  for (int32_t row = first; row < last; row += ROWS) {
    const int32_t rows = least(last - row, ROWS);
    Blocks blocks = blocks_at(weight, table.at, row, rows, 0);
    __m256 out[TOKENS], low[TOKENS];
    for (int t = 0; t < TOKENS; ++t) out[t] = low[t] = _mm256_setzero_ps();
    int64_t at = 0;
    for (int32_t column = 0; column < in.columns; column += Type::COLUMNS, at += Type::BYTES) {
      ahead.template fetch<Type::BYTES>(blocks, at);
      add_block<Type, TOKENS>(blocks, in, column, out, low);
      for (int r = 0; r < ROWS; ++r) blocks.row[r] += Type::BYTES;
    }
    for (int t = 0; t < TOKENS; ++t) {
      alignas(32) float found[ROWS];
      _mm256_store_ps(found, Type::MINIMUMS ? _mm256_add_ps(out[t], low[t]) : out[t]);
      __builtin_memcpy(outputs + t * in.rows + row, found, sizeof(float) * static_cast<size_t>(rows));
    }
  }
}

template <typename Type>
void rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  Inputs part = in;
  for (int32_t t = 0; t < in.tokens; t += part.tokens) {
    part.tokens = !SMALL_CODE && in.tokens - t >= 4 ? 4 : 1;
    part.values = in.values + t * in.stride;
    part.scale = in.scale + static_cast<int64_t>(t) * in.groups;
    part.sums = in.sums + static_cast<int64_t>(t) * in.groups;
    if constexpr (!SMALL_CODE)
      if (part.tokens == 4) multiply_rows<Type, 4>(weight, part, first, last, outputs + t * in.rows);
    if (part.tokens == 1) multiply_rows<Type, 1>(weight, part, first, last, outputs + t * in.rows);
  }
}

// Sixteen bytes of each row's super-block as four registers: dword j of row r in lane r of words[j].
INLINE void load_words(const Blocks& blocks, int at, __m256i* words) {
  __m256i v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks.row[i] + at));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks.row[i + 4] + at));
    v[i] = _mm256_set_m128i(high, low);
  }
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  words[0] = _mm256_unpacklo_epi64(a, b);
  words[1] = _mm256_unpackhi_epi64(a, b);
  words[2] = _mm256_unpacklo_epi64(c, d);
  words[3] = _mm256_unpackhi_epi64(c, d);
}

// The lower halves of dwords, as float16.
INLINE __m256 lower_halves(__m256i words) {
  const __m256i halves = _mm256_and_si256(words, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

// Four bytes at `at` of each row's block.
INLINE __m256i words_at(const Blocks& blocks, int at) {
  int32_t words[ROWS];
  for (int r = 0; r < ROWS; ++r) __builtin_memcpy(words + r, blocks.row[r] + at, 4);
  return _mm256_setr_epi32(words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]);
}

INLINE __m256 upper_halves(__m256i words) { return lower_halves(_mm256_srli_epi32(words, 16)); }

// The float16 number at `at` of every row's super-block.
INLINE __m256 halves_at(const Blocks& blocks, int at) {
  int16_t halves[ROWS];
  for (int r = 0; r < ROWS; ++r) __builtin_memcpy(halves + r, blocks.row[r] + at, 2);
  return _mm256_cvtph_ps(
      _mm_setr_epi16(halves[0], halves[1], halves[2], halves[3], halves[4], halves[5], halves[6], halves[7]));
}

// Whole numbers of fields of dwords: unsigned ones of `mask` from bit SHIFT on, and signed bytes.
template <int SHIFT>
INLINE __m256 field(__m256i words, int mask) {
  const __m256i shifted = SHIFT == 0 ? words : _mm256_srli_epi32(words, SHIFT);
  return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(mask)));
}

template <int BYTE>
INLINE __m256 signed_byte(__m256i words) {
  const __m256i shifted = BYTE == 3 ? words : _mm256_slli_epi32(words, 24 - 8 * BYTE);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(shifted, 24));
}

// Fields of every byte; see `field`.
template <int SHIFT>
INLINE __m256i word_bits(__m256i words, int each) {
  __m256i shifted = words;
  if constexpr (SHIFT > 0) shifted = _mm256_srli_epi32(words, SHIFT);
  if constexpr (SHIFT < 0) shifted = _mm256_slli_epi32(words, -SHIFT);
  return _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(each)));
}

}  // namespace
}  // namespace quern
