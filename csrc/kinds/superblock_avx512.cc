// ggml's super-blocks, 16 rows side by side: 64 codes a register, whose products are added by groups as in
// rows_avx512-inl.h, with a row in each lane; scales and minimums are decoded with a row in each lane too.
#include "kinds/rows_avx512-inl.h"
#include "kinds/superblock-inl.h"

namespace quern {
namespace {

constexpr int CHUNK = 64, CHUNKS = SUPER / CHUNK;  // columns of a register

// Up to 16 rows; in the place of those from `rows` on is the first one.
struct Lines {
  const uint8_t* at[ROWS];
  __m512i offsets;  // from the first

  Lines(const Weight& weight, int32_t row, int32_t rows) {
    for (int r = 0; r < ROWS; ++r) at[r] = blocks_of(weight, row + (r < rows ? r : 0));
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    offsets = _mm512_maskz_mullo_epi32(first_lanes(rows), lanes, _mm512_set1_epi32(static_cast<int32_t>(weight.row_bytes)));
  }
};

// The four bytes `at` of each row.
INLINE __m512i word(const Lines& lines, int64_t at) { return _mm512_i32gather_epi32(lines.offsets, lines.at[0] + at, 1); }

// The 16 bytes from `at` on: register i has bytes 4 * i ... of each row in a lane.
struct Words {
  __m512i at[4];

  Words(const Lines& lines, int64_t from) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m128i line[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) line[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lines.at[4 * j + i] + from));
      const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(line[0]), line[1], 1);
      v[i] = _mm512_inserti32x4(_mm512_inserti32x4(two, line[2], 2), line[3], 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    at[0] = _mm512_unpacklo_epi64(low01, low23);
    at[1] = _mm512_unpackhi_epi64(low01, low23);
    at[2] = _mm512_unpacklo_epi64(high01, high23);
    at[3] = _mm512_unpackhi_epi64(high01, high23);
  }
};

INLINE __m512 low_halves(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
INLINE __m512 high_halves(__m512i words) { return low_halves(_mm512_srli_epi32(words, 16)); }

INLINE __m512i fields(__m512i words, int shift, int mask) {
  return _mm512_and_si512(_mm512_srli_epi32(words, static_cast<unsigned>(shift)), _mm512_set1_epi32(mask));
}

// Two bits from bit `shift` on as the fifth and sixth above `low`.
INLINE __m512i with_upper(__m512i low, __m512i words, int shift) {
  const __m512i moved = shift >= 4 ? _mm512_srli_epi32(words, static_cast<unsigned>(shift - 4))
                                   : _mm512_slli_epi32(words, static_cast<unsigned>(4 - shift));
  return _mm512_ternarylogic_epi32(low, moved, _mm512_set1_epi32(0x30), 0xf8);  // low | (moved & 0x30)
}

INLINE __m512 times(__m512i whole, __m512 d) { return _mm512_mul_ps(_mm512_cvtepi32_ps(whole), d); }

INLINE __m512 negative(__m512 v) { return _mm512_sub_ps(_mm512_setzero_ps(), v); }

// Eight scales and minimums of six bits behind d and d_min.
INLINE void six_bit_numbers(const Lines& lines, int64_t block, __m512* scales, __m512* minimums) {
  const Words w(lines, block);
  const __m512 d = low_halves(w.at[0]), least = negative(high_halves(w.at[0]));
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    scales[g] = times(fields(w.at[1], 8 * g, 63), d);
    minimums[g] = times(fields(w.at[2], 8 * g, 63), least);
    scales[4 + g] = times(with_upper(fields(w.at[3], 8 * g, 15), w.at[1], 8 * g + 6), d);
    minimums[4 + g] = times(with_upper(fields(w.at[3], 8 * g + 4, 15), w.at[2], 8 * g + 6), least);
  }
}

// What gf2p8affineqb multiplies a byte by (Intel SDM) to have its `count` bits from bit `from` on at bit `to`, and no others.
INLINE int64_t moving(int from, int count, int to) {
  uint64_t matrix = 0;
  for (int i = 0; i < count; ++i) matrix |= uint64_t{1} << (from + i) << 8 * (7 - to - i);
  return static_cast<int64_t>(matrix);
}

// For the first 32 bytes of a register, and for the others.
INLINE __m512i two_moves(int64_t first, int64_t second) {
  return _mm512_mask_set1_epi64(_mm512_set1_epi64(first), 0xf0, second);
}

INLINE __m512i moved(__m512i bytes, __m512i matrix) { return _mm512_gf2p8affine_epi64_epi8(bytes, matrix, 0); }

// 32 bytes, twice.
INLINE __m512i twice(const uint8_t* at) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

// What there is to know of a type: `codes` are the values of chunk `chunk` of a super-block, plus SHIFT, as unsigned bytes;
// `numbers` its scales, and minimums where it has any, of the super-block that begins at byte `block` of the rows; NARROW:
// whether two lanes of products fit 16 bits.
template <typename Type>
struct Code;

template <>
struct Code<Q2K> {
  static constexpr int SHIFT = 0;
  static constexpr bool NARROW = true;
  int chunk;
  __m512i low;
  INLINE Code make(int chunk) {
    return {chunk, two_moves(moving(chunk % 2 * 4, 2, 0), moving(chunk % 2 * 4 + 2, 2, 0))};
  }
  INLINE __m512i codes(const Code& self, const uint8_t* b) { return moved(twice(b + 16 + self.chunk / 2 * 32), self.low); }
  INLINE void numbers(const Lines& lines, int64_t block, __m512* scales, __m512* minimums) {
    const Words w(lines, block);
    const __m512i both = word(lines, block + Q2K::D_AT);
    const __m512 d = low_halves(both), least = negative(high_halves(both));
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      scales[g] = times(fields(w.at[g / 4], g % 4 * 8, 15), d);
      minimums[g] = times(fields(w.at[g / 4], g % 4 * 8 + 4, 15), least);
    }
  }
};

template <>
struct Code<Q3K> {
  static constexpr int SHIFT = 4;
  static constexpr bool NARROW = true;
  int chunk;
  __m512i low, high;
  INLINE Code make(int chunk) {
    return {chunk, two_moves(moving(chunk % 2 * 4, 2, 0), moving(chunk % 2 * 4 + 2, 2, 0)),
            two_moves(moving(2 * chunk, 1, 2), moving(2 * chunk + 1, 1, 2))};
  }
  INLINE __m512i codes(const Code& self, const uint8_t* b) {
    return _mm512_or_si512(moved(twice(b + 32 + self.chunk / 2 * 32), self.low), moved(twice(b), self.high));
  }
  INLINE void numbers(const Lines& lines, int64_t block, __m512* scales, __m512*) {
    constexpr int FIRST = 2;  // the last 16 bytes are two of codes, twelve of scales, and d
    const Words w(lines, block + Q3K::BYTES - 16);
    const __m512 d = high_halves(w.at[3]);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      const int low_at = FIRST + g % 8, high_at = FIRST + 8 + g % 4;
      const __m512i low = fields(w.at[low_at / 4], low_at % 4 * 8 + g / 8 * 4, 15);
      const __m512i all = with_upper(low, w.at[high_at / 4], high_at % 4 * 8 + g / 4 * 2);
      scales[g] = times(_mm512_sub_epi32(all, _mm512_set1_epi32(32)), d);
    }
  }
};

template <>
struct Code<Q4K> {
  static constexpr int SHIFT = 0;
  static constexpr bool NARROW = true;
  int chunk;
  __m512i low;
  INLINE Code make(int chunk) { return {chunk, two_moves(moving(0, 4, 0), moving(4, 4, 0))}; }
  INLINE __m512i codes(const Code& self, const uint8_t* b) { return moved(twice(b + 16 + 32 * self.chunk), self.low); }
  INLINE void numbers(const Lines& lines, int64_t block, __m512* scales, __m512* minimums) {
    six_bit_numbers(lines, block, scales, minimums);
  }
};

template <>
struct Code<Q5K> {
  static constexpr int SHIFT = 0;
  static constexpr bool NARROW = true;
  int chunk;
  __m512i low, high;
  INLINE Code make(int chunk) {
    return {chunk, two_moves(moving(0, 4, 0), moving(4, 4, 0)),
            two_moves(moving(2 * chunk, 1, 4), moving(2 * chunk + 1, 1, 4))};
  }
  INLINE __m512i codes(const Code& self, const uint8_t* b) {
    return _mm512_or_si512(moved(twice(b + 48 + 32 * self.chunk), self.low), moved(twice(b + 16), self.high));
  }
  INLINE void numbers(const Lines& lines, int64_t block, __m512* scales, __m512* minimums) {
    six_bit_numbers(lines, block, scales, minimums);
  }
};

template <>
struct Code<Q6K> {
  static constexpr int SHIFT = 32;
  static constexpr bool NARROW = false;
  int chunk;
  __m512i low, high;
  INLINE Code make(int chunk) {
    const int64_t nibble = moving(chunk % 2 * 4, 4, 0);
    return {chunk, two_moves(nibble, nibble), two_moves(moving(chunk % 2 * 4, 2, 4), moving(chunk % 2 * 4 + 2, 2, 4))};
  }
  INLINE __m512i codes(const Code& self, const uint8_t* b) {
    const __m512i low = moved(_mm512_loadu_si512(b + self.chunk / 2 * 64), self.low);
    return _mm512_or_si512(low, moved(twice(b + 128 + self.chunk / 2 * 32), self.high));
  }
  INLINE void numbers(const Lines& lines, int64_t block, __m512* scales, __m512*) {
    const Words w(lines, block + 192);
    const __m512 d = high_halves(word(lines, block + Q6K::D_AT - 2));
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      const __m512i top = _mm512_slli_epi32(w.at[g / 4], static_cast<unsigned>(24 - g % 4 * 8));
      scales[g] = times(_mm512_srai_epi32(top, 24), d);
    }
  }
};

template <>
struct Code<IQ4XS> {
  static constexpr int SHIFT = 128;
  static constexpr bool NARROW = false;
  int chunk;
  __m512i low, levels;
  INLINE Code make(int chunk) {
    const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(IQ4_LEVELS));
    const __m512i shifted = _mm512_xor_si512(_mm512_broadcast_i32x4(levels), _mm512_set1_epi8(-128));
    return {chunk, _mm512_mask_set1_epi64(_mm512_set1_epi64(moving(0, 4, 0)), 0xcc, moving(4, 4, 0)), shifted};
  }
  INLINE __m512i codes(const Code& self, const uint8_t* b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 8 + 32 * self.chunk));
    const __m512i order = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
    const __m512i bytes = _mm512_permutexvar_epi64(order, _mm512_castsi256_si512(both));
    return _mm512_shuffle_epi8(self.levels, moved(bytes, self.low));
  }
  INLINE void numbers(const Lines& lines, int64_t block, __m512* scales, __m512*) {
    const Words w(lines, block);
    const __m512 d = low_halves(w.at[0]);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const __m512i all = with_upper(fields(w.at[1], 4 * g, 15), w.at[0], 16 + 2 * g);
      scales[g] = times(_mm512_sub_epi32(all, _mm512_set1_epi32(32)), d);
    }
  }
};

constexpr int64_t AHEAD = 512;  // bytes from what is taken of a row to what is fetched of it

// What a token's inputs of a super-block are to each of its groups, to be read into all lanes.
template <int GROUPS>
struct Totals {
  alignas(64) int32_t shift[16];  // what sums of shifted codes are too great by
  alignas(64) float low[16];      // what a minimum multiplies

  Totals(const int32_t* sums, const float* scale, int by) {
    const __m512i found = _mm512_maskz_loadu_epi32(first_lanes(GROUPS), sums);
    const __m512 xs = _mm512_maskz_loadu_ps(first_lanes(GROUPS), scale);
    _mm512_store_si512(shift, _mm512_mullo_epi32(found, _mm512_set1_epi32(by)));
    _mm512_store_ps(low, _mm512_mul_ps(_mm512_cvtepi32_ps(found), xs));
    asm("" : "+m"(shift), "+m"(low));
  }
};

// Up to 16 rows and few tokens.
template <typename Type, int TOKENS>
INLINE void multiply_block(const Weight& weight, const Inputs& in, int32_t row, int32_t rows, const Code<Type>* code,
                           float* outputs) {
  constexpr int GROUPS = SUPER / Type::GROUP, EACH = CHUNK / Type::GROUP;  // groups of a super-block, and of a chunk
  const Lines lines(weight, row, rows);
  __m512 out[TOKENS], low[TOKENS];
  for (int t = 0; t < TOKENS; ++t) out[t] = low[t] = _mm512_setzero_ps();
  int64_t block = 0;
  for (int32_t column = 0; column < in.columns; column += SUPER, block += Type::BYTES) {
    const Ahead next = ahead_of(block, AHEAD, weight.row_bytes);
    const int64_t ahead = next.rows * weight.row_bytes + next.at;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) fetch(lines.at[r], ahead, Type::BYTES);
    __m512 scales[GROUPS], minimums[Type::MINIMUMS ? GROUPS : 1];
    Code<Type>::numbers(lines, block, scales, minimums);
    const int64_t group = column / Type::GROUP;
#pragma GCC unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const Code<Type> here = code[chunk];
      __m512i sums[TOKENS][ROWS], x[TOKENS];
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) x[t] = _mm512_loadu_si512(in.values + t * in.stride + column + CHUNK * chunk);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const __m512i codes = Code<Type>::codes(here, lines.at[r] + block);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) sums[t][r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x[t]);
      }
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        const int64_t at = static_cast<int64_t>(t) * in.groups + group;
        const Totals<GROUPS> totals(in.sums + at, in.scale + at, Code<Type>::SHIFT);
        __m512i found[EACH];
        add_lanes<Type::GROUP / 4, Code<Type>::NARROW>(sums[t], found);
#pragma GCC unroll 4
        for (int i = 0; i < EACH; ++i) {
          const int place = chunk * EACH + i;
          __m512i sum = found[i];
          if (Code<Type>::SHIFT != 0) sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(totals.shift[place]));
          const __m512 both = _mm512_mul_ps(scales[place], _mm512_set1_ps(in.scale[at + place]));
          out[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, out[t]);
          if constexpr (Type::MINIMUMS) low[t] = _mm512_fmadd_ps(minimums[place], _mm512_set1_ps(totals.low[place]), low[t]);
        }
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    _mm512_mask_storeu_ps(outputs + t * in.rows + row, first_lanes(rows),
                          Type::MINIMUMS ? _mm512_add_ps(out[t], low[t]) : out[t]);
}

template <typename Type, int TOKENS>
void multiply_blocks(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  Code<Type> code[CHUNKS];
  for (int chunk = 0; chunk < CHUNKS; ++chunk) code[chunk] = Code<Type>::make(chunk);
  for (int32_t row = first; row < last; row += ROWS)
    multiply_block<Type, TOKENS>(weight, in, row, least(last - row, ROWS), code, outputs);
}

// Four, two or one token at a time; see codebook_avx512.cc.
template <typename Type>
void rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  Inputs part = in;
  for (int32_t t = 0; t < in.tokens; t += part.tokens) {
    const int32_t left = in.tokens - t;
    part.tokens = left == 1 ? 1 : left < 4 ? 2 : 4;
    part.values = in.values + t * in.stride;
    part.scale = in.scale + static_cast<int64_t>(t) * in.groups;
    part.sums = in.sums + static_cast<int64_t>(t) * in.groups;
    float* to = outputs + t * in.rows;
    if (part.tokens == 4) multiply_blocks<Type, 4>(weight, part, first, last, to);
    if (part.tokens == 2) multiply_blocks<Type, 2>(weight, part, first, last, to);
    if (part.tokens == 1) multiply_blocks<Type, 1>(weight, part, first, last, to);
  }
}

template <typename Type>
void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* out) {
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(Code<Type>::SHIFT));
  const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
  const int32_t end = part.first_column + part.columns;
  for (int32_t r = 0; r < part.rows; r += ROWS) {
    const Lines lines(weight, part.first_row + r, least(part.rows - r, ROWS));
    int8_t* to = out + static_cast<int64_t>(r / ROWS) * part.blocks * LANES;
    for (int32_t column = part.first_column / CHUNK * CHUNK; column < end; column += CHUNK) {
      const int64_t block = column / SUPER * static_cast<int64_t>(Type::BYTES);
      const Code<Type> code = Code<Type>::make(column % SUPER / CHUNK);
      __m512i v[ROWS];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
        v[i] = _mm512_xor_si512(_mm512_sub_epi8(Code<Type>::codes(code, lines.at[i] + block), shift), flips);
      transpose(v);
      for (int b = 0; b < CHUNK / 4; ++b) {
        const int32_t place = column + 4 * b - part.first_column;
        if (place >= 0 && place < part.columns) _mm512_storeu_si512(to + place / 4 * static_cast<int64_t>(LANES), v[b]);
      }
    }
  }
}

template <typename Type>
void numbers(const Weight& weight, int32_t first, int32_t rows, float* scales, float* minimums) {
  constexpr int GROUPS = SUPER / Type::GROUP;
  for (int32_t r = 0; r < rows; r += ROWS) {
    const Lines lines(weight, first + r, least(rows - r, ROWS));
    for (int32_t column = 0; column < weight.columns; column += SUPER) {
      __m512 found[GROUPS], low[Type::MINIMUMS ? GROUPS : 1];
      Code<Type>::numbers(lines, column / SUPER * static_cast<int64_t>(Type::BYTES), found, low);
      const int64_t at = static_cast<int64_t>(column / Type::GROUP) * TILE_ROWS + r;
#pragma GCC unroll 1
      for (int g = 0; g < GROUPS; ++g) {
        _mm512_storeu_ps(scales + at + g * TILE_ROWS, found[g]);
        if constexpr (Type::MINIMUMS) _mm512_storeu_ps(minimums + at + g * TILE_ROWS, low[g]);
      }
    }
  }
}

}  // namespace

const KindKernels q2_k_avx512 = {rows<Q2K>, nullptr, panel<Q2K>, numbers<Q2K>};
const KindKernels q3_k_avx512 = {rows<Q3K>, nullptr, panel<Q3K>, numbers<Q3K>};
const KindKernels q4_k_avx512 = {rows<Q4K>, nullptr, panel<Q4K>, numbers<Q4K>};
const KindKernels q5_k_avx512 = {rows<Q5K>, nullptr, panel<Q5K>, numbers<Q5K>};
const KindKernels q6_k_avx512 = {rows<Q6K>, nullptr, panel<Q6K>, numbers<Q6K>};
const KindKernels iq4_xs_avx512 = {rows<IQ4XS>, nullptr, panel<IQ4XS>, numbers<IQ4XS>};

}  // namespace quern
