// ggml's super-blocks, 16 rows side by side: 64 codes a register, whose products are added by groups as in
// rows_avx512-inl.h, with a row in each lane; scales and minimums are decoded with a row in each lane too.
#include "kinds/rows_avx512-inl.h"
#include "kinds/superblock-inl.h"

namespace quern {
namespace {

constexpr int CHUNK = 64;  // columns of a register

// The same super-block of up to 16 rows; those from `rows` on are row 0.
struct Blocks {
  const uint8_t* first;
  int64_t stride;
  int32_t rows;
  __m512i offsets;  // of each row

  Blocks(const Weight& weight, int32_t row, int32_t count, int32_t column, int32_t bytes)
      : first(blocks_of(weight, row) + column / SUPER * static_cast<int64_t>(bytes)), stride(weight.row_bytes), rows(count) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    offsets = _mm512_maskz_mullo_epi32(first_lanes(count), lanes, _mm512_set1_epi32(static_cast<int32_t>(stride)));
  }

  INLINE const uint8_t* of(const Blocks& b, int r) { return b.first + (r < b.rows ? r : 0) * b.stride; }
};

// The four bytes `at` of each row, as two numbers of 16 bits.
INLINE __m512i words(const Blocks& b, int32_t at) { return _mm512_i32gather_epi32(b.offsets, b.first + at, 1); }
INLINE __m512 low_halves(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }
INLINE __m512 high_halves(__m512i words) { return low_halves(_mm512_srli_epi32(words, 16)); }

// 16 bytes of each row, from byte `at` of the super-block on.
class Bytes {
 public:
  Bytes(const Blocks& b, int32_t at) {
    __m512i exchanged[4];
    load_bytes(b.first + at, b.stride, b.rows, exchanged);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_si512(at_[i], exchanged[i]);
    asm("" : "+m"(at_));  // to be widened as they are read
  }
  // Byte `i` of all rows.
  INLINE __m128i of(const Bytes& self, int i) { return _mm_load_si128(reinterpret_cast<const __m128i*>(self.at_[i % 4][i / 4])); }

 private:
  alignas(64) uint8_t at_[4][4][16];
};

INLINE __m128i fields(__m128i bytes, int shift, int mask) {
  return _mm_and_si128(_mm_srli_epi16(bytes, shift), _mm_set1_epi8(static_cast<char>(mask)));
}

// Two bits from bit `shift` on as the fifth and sixth above `low`.
INLINE __m128i with_upper(__m128i low, __m128i bytes, int shift) {
  return _mm_or_si128(low, _mm_slli_epi16(fields(bytes, shift, 3), 4));
}

INLINE __m512 times(__m128i bytes, __m512 d) { return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), d); }

INLINE __m512 signed_times(__m128i bytes, __m512 d) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), d);
}

INLINE __m512 negative(__m512 v) { return _mm512_sub_ps(_mm512_setzero_ps(), v); }

// Eight scales and minimums of six bits, which begin with byte 4 of a header whose first numbers are d and d_min.
INLINE void six_bit_numbers(const Blocks& b, __m512* scales, __m512* minimums) {
  const Bytes bytes(b, 0);
  const __m512i both = words(b, 0);
  const __m512 d = low_halves(both), least = negative(high_halves(both));
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    const __m128i first = Bytes::of(bytes, 4 + g), second = Bytes::of(bytes, 8 + g), third = Bytes::of(bytes, 12 + g);
    scales[g] = times(fields(first, 0, 63), d);
    minimums[g] = times(fields(second, 0, 63), least);
    scales[4 + g] = times(with_upper(fields(third, 0, 15), first, 6), d);
    minimums[4 + g] = times(with_upper(fields(third, 4, 15), second, 6), least);
  }
}

// A shift for the first 32 bytes of a register, and one for the others.
INLINE __m512i two_shifts(int first, int second) {
  return _mm512_mask_set1_epi16(_mm512_set1_epi16(static_cast<int16_t>(first)), 0xffff0000, static_cast<int16_t>(second));
}

INLINE __m512i two_bits(int first, int second) { return _mm512_sllv_epi16(_mm512_set1_epi16(0x0101), two_shifts(first, second)); }

// 32 bytes, twice.
INLINE __m512i twice(const uint8_t* at) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

INLINE __m512i fields(__m512i bytes, __m512i shifts, int mask) {
  return _mm512_and_si512(_mm512_srlv_epi16(bytes, shifts), _mm512_set1_epi8(static_cast<char>(mask)));
}

// `codes` plus `worth` where a byte has one of `bits`.
INLINE __m512i with_bit(__m512i codes, __m512i bytes, __m512i bits, int worth) {
  return _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(bytes, bits), codes, _mm512_set1_epi8(static_cast<char>(worth)));
}

// What there is to know of a type: `codes` are the values of chunk `chunk` of a super-block, plus SHIFT, as unsigned bytes;
// `numbers` its scales, and minimums where it has any; NARROW: whether two lanes of products fit 16 bits.
template <typename Type>
struct Code;

template <>
struct Code<Q2K> {
  static constexpr int SHIFT = 0;
  static constexpr bool NARROW = true;
  int chunk;
  __m512i shifts;
  INLINE Code make(int chunk) { return {chunk, two_shifts(chunk % 2 * 4, chunk % 2 * 4 + 2)}; }
  INLINE __m512i codes(const Code& self, const uint8_t* b) { return fields(twice(b + 16 + self.chunk / 2 * 32), self.shifts, 3); }
  INLINE void numbers(const Blocks& b, __m512* scales, __m512* minimums) {
    const Bytes bytes(b, 0);
    const __m512i both = words(b, Q2K::D_AT);
    const __m512 d = low_halves(both), least = negative(high_halves(both));
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      scales[g] = times(fields(Bytes::of(bytes, g), 0, 15), d);
      minimums[g] = times(fields(Bytes::of(bytes, g), 4, 15), least);
    }
  }
};

template <>
struct Code<Q3K> {
  static constexpr int SHIFT = 4;
  static constexpr bool NARROW = true;
  int chunk;
  __m512i shifts, bits;
  INLINE Code make(int chunk) {
    return {chunk, two_shifts(chunk % 2 * 4, chunk % 2 * 4 + 2), two_bits(2 * chunk, 2 * chunk + 1)};
  }
  INLINE __m512i codes(const Code& self, const uint8_t* b) {
    return with_bit(fields(twice(b + 32 + self.chunk / 2 * 32), self.shifts, 3), twice(b), self.bits, 4);
  }
  INLINE void numbers(const Blocks& b, __m512* scales, __m512*) {
    constexpr int FIRST = 2;  // the last 16 bytes are two codes, twelve of scales, and d
    const Bytes bytes(b, Q3K::BYTES - 16);
    const __m512 d = high_halves(words(b, Q3K::D_AT - 2));
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
      const __m128i low = fields(Bytes::of(bytes, FIRST + g % 8), g / 8 * 4, 15);
      const __m128i all = with_upper(low, Bytes::of(bytes, FIRST + 8 + g % 4), g / 4 * 2);
      scales[g] = signed_times(_mm_sub_epi8(all, _mm_set1_epi8(32)), d);
    }
  }
};

template <>
struct Code<Q4K> {
  static constexpr int SHIFT = 0;
  static constexpr bool NARROW = true;
  int chunk;
  __m512i shifts;
  INLINE Code make(int chunk) { return {chunk, two_shifts(0, 4)}; }
  INLINE __m512i codes(const Code& self, const uint8_t* b) { return fields(twice(b + 16 + 32 * self.chunk), self.shifts, 15); }
  INLINE void numbers(const Blocks& b, __m512* scales, __m512* minimums) { six_bit_numbers(b, scales, minimums); }
};

template <>
struct Code<Q5K> {
  static constexpr int SHIFT = 0;
  static constexpr bool NARROW = true;
  int chunk;
  __m512i shifts, bits;
  INLINE Code make(int chunk) { return {chunk, two_shifts(0, 4), two_bits(2 * chunk, 2 * chunk + 1)}; }
  INLINE __m512i codes(const Code& self, const uint8_t* b) {
    return with_bit(fields(twice(b + 48 + 32 * self.chunk), self.shifts, 15), twice(b + 16), self.bits, 16);
  }
  INLINE void numbers(const Blocks& b, __m512* scales, __m512* minimums) { six_bit_numbers(b, scales, minimums); }
};

template <>
struct Code<Q6K> {
  static constexpr int SHIFT = 32;
  static constexpr bool NARROW = false;
  int chunk;
  __m512i shifts, upper;
  INLINE Code make(int chunk) {
    // vpmultishiftqb picks for every byte the 8 bits from some bit of its quadword on: the two wanted go to bits 4 and 5.
    const __m512i own = _mm512_set1_epi64(0x3830282018100800);
    const __m512i from = _mm512_mask_set1_epi8(_mm512_set1_epi8(static_cast<char>(chunk % 2 * 4 - 4)), 0xffffffff00000000,
                                               static_cast<char>(chunk % 2 * 4 - 2));
    return {chunk, two_shifts(chunk % 2 * 4, chunk % 2 * 4), _mm512_add_epi8(own, from)};
  }
  INLINE __m512i codes(const Code& self, const uint8_t* b) {
    const __m512i low = fields(_mm512_loadu_si512(b + self.chunk / 2 * 64), self.shifts, 15);
    const __m512i high = _mm512_multishift_epi64_epi8(self.upper, twice(b + 128 + self.chunk / 2 * 32));
    return _mm512_ternarylogic_epi64(low, high, _mm512_set1_epi8(0x30), 0xf8);  // low | (high & 0x30)
  }
  INLINE void numbers(const Blocks& b, __m512* scales, __m512*) {
    const Bytes bytes(b, 192);
    const __m512 d = high_halves(words(b, Q6K::D_AT - 2));
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) scales[g] = signed_times(Bytes::of(bytes, g), d);
  }
};

template <>
struct Code<IQ4XS> {
  static constexpr int SHIFT = 128;
  static constexpr bool NARROW = false;
  int chunk;
  __m512i shifts, levels;
  INLINE Code make(int chunk) {
    const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(IQ4_LEVELS));
    const __m512i shifted = _mm512_xor_si512(_mm512_broadcast_i32x4(levels), _mm512_set1_epi8(-128));
    return {chunk, _mm512_mask_set1_epi16(_mm512_setzero_si512(), 0xff00ff00, 4), shifted};
  }
  INLINE __m512i codes(const Code& self, const uint8_t* b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 8 + 32 * self.chunk));
    const __m512i order = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
    const __m512i bytes = _mm512_permutexvar_epi64(order, _mm512_castsi256_si512(both));
    return _mm512_shuffle_epi8(self.levels, fields(bytes, self.shifts, 15));
  }
  INLINE void numbers(const Blocks& b, __m512* scales, __m512*) {
    const Bytes bytes(b, 0);
    const __m512 d = low_halves(words(b, 0));
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g) {
      const __m128i low = fields(Bytes::of(bytes, 4 + g / 2), g % 2 * 4, 15);
      const __m128i all = with_upper(low, Bytes::of(bytes, 2 + g / 4), g % 4 * 2);
      scales[g] = signed_times(_mm_sub_epi8(all, _mm_set1_epi8(32)), d);
    }
  }
};

constexpr int64_t AHEAD = 512;  // bytes from what is taken of a row to what is fetched of it

// Up to 16 rows and few tokens.
template <typename Type, int TOKENS>
INLINE void multiply_block(const Weight& weight, const Inputs& in, int32_t row, int32_t rows, float* outputs) {
  constexpr int GROUPS = SUPER / Type::GROUP, EACH = CHUNK / Type::GROUP;  // groups of a super-block, and of a chunk
  __m512 out[TOKENS], low[TOKENS];
  for (int t = 0; t < TOKENS; ++t) out[t] = low[t] = _mm512_setzero_ps();
  for (int32_t column = 0; column < in.columns; column += SUPER) {
    const Blocks blocks(weight, row, rows, column, Type::BYTES);
    const Ahead next = ahead_of(column / SUPER * static_cast<int64_t>(Type::BYTES), AHEAD, weight.row_bytes);
    const uint8_t* line = blocks_of(weight, row) + next.rows * weight.row_bytes + next.at;
    for (int r = 0; r < rows; ++r, line += weight.row_bytes) fetch(line, 0, Type::BYTES);
    __m512 scales[GROUPS], minimums[Type::MINIMUMS ? GROUPS : 1];
    Code<Type>::numbers(blocks, scales, minimums);
#pragma GCC unroll 1
    for (int chunk = 0; chunk < SUPER / CHUNK; ++chunk) {
      const Code<Type> code = Code<Type>::make(chunk);
      __m512i sums[TOKENS][ROWS], x[TOKENS];
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) x[t] = _mm512_loadu_si512(in.values + t * in.stride + column + CHUNK * chunk);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const __m512i codes = Code<Type>::codes(code, Blocks::of(blocks, r));
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) sums[t][r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x[t]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        __m512i found[EACH];
        add_lanes<Type::GROUP / 4, Code<Type>::NARROW>(sums[t], found);
#pragma GCC unroll 4
        for (int i = 0; i < EACH; ++i) {
          const int place = chunk * EACH + i;
          const int64_t at = static_cast<int64_t>(t) * in.groups + column / Type::GROUP + place;
          const __m512 xs = _mm512_set1_ps(in.scale[at]);
          const __m512i sum = _mm512_sub_epi32(found[i], _mm512_set1_epi32(Code<Type>::SHIFT * in.sums[at]));
          out[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scales[place], xs), out[t]);
          if constexpr (Type::MINIMUMS) {
            const __m512 total = _mm512_set1_ps(static_cast<float>(in.sums[at]));
            low[t] = _mm512_fmadd_ps(total, _mm512_mul_ps(minimums[place], xs), low[t]);
          }
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
  for (int32_t row = first; row < last; row += ROWS)
    multiply_block<Type, TOKENS>(weight, in, row, least(last - row, ROWS), outputs);
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
    int8_t* to = out + static_cast<int64_t>(r / ROWS) * part.blocks * LANES;
    for (int32_t column = part.first_column / CHUNK * CHUNK; column < end; column += CHUNK) {
      const Blocks blocks(weight, part.first_row + r, least(part.rows - r, ROWS), column, Type::BYTES);
      const Code<Type> code = Code<Type>::make(column % SUPER / CHUNK);
      __m512i v[ROWS];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i)
        v[i] = _mm512_xor_si512(_mm512_sub_epi8(Code<Type>::codes(code, Blocks::of(blocks, i)), shift), flips);
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
  for (int32_t r = 0; r < rows; r += ROWS)
    for (int32_t column = 0; column < weight.columns; column += SUPER) {
      const Blocks blocks(weight, first + r, least(rows - r, ROWS), column, Type::BYTES);
      __m512 found[GROUPS], low[Type::MINIMUMS ? GROUPS : 1];
      Code<Type>::numbers(blocks, found, low);
      const int64_t at = static_cast<int64_t>(column / Type::GROUP) * TILE_ROWS + r;
#pragma GCC unroll 1
      for (int g = 0; g < GROUPS; ++g) {
        _mm512_storeu_ps(scales + at + g * TILE_ROWS, found[g]);
        if constexpr (Type::MINIMUMS) _mm512_storeu_ps(minimums + at + g * TILE_ROWS, low[g]);
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
