// Products of rows and few tokens for codes that lie along the rows; see rows_avx512.cc. vpmaddubsw adds two products in 16
// bits: 4-bit integers stay far below their limit, so eight of its results are added before they are widened; values of
// more bits are widened at once.
//
// Groups of 16, 32 and 64 bytes of codes are added eight groups at a time, by exchanging lanes between their registers; all
// other sizes, and a row's last groups, one at a time. Of more than four tokens and groups of 32 and 64 bytes lanes are tokens.
// Groups of 8 and 16 bytes meet one token eight rows at a time (squares_avx2-inl.h).
//
// No include guard and no linkage: for <kind>_avx2.cc alone. Such a file says in a struct `Code` how its codes become values:
// PER_BYTE codes a byte; `add` adds the products of one register of them with the inputs from byte `at` of a row on (the
// register itself lies `moved` bytes further); SQUARES: whether one token may meet eight rows of them at a time;
// NARROW: in lanes of 16 bits, which hold those of four registers (4 * 2 * 2 * 15 * 127 = 30480), of codes as stored, less the
// zero point.
#include "kernels/common_avx2.h"
#include "kinds/kinds.h"
#include "kinds/lanes_avx2-inl.h"
#include "kinds/squares_avx2-inl.h"

namespace quern {
namespace {

// sums, of 32 bits, += products of `COUNT` registers, at most four. They lie `moved` bytes further in the row than `at` says.
template <typename Code, int TOKENS, int COUNT>
INLINE void add_registers(const Code& code, const uint8_t* row, const Inputs& in, int64_t at, __m256i* sums, int64_t moved = 0) {
  __m256i some[TOKENS];
  for (int t = 0; t < TOKENS; ++t) some[t] = Code::NARROW ? _mm256_setzero_si256() : sums[t];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) Code::template add<TOKENS>(code, load(row + at + 32 * i), in, at + 32 * i, some, moved);
  for (int t = 0; t < TOKENS; ++t)
    sums[t] = Code::NARROW ? _mm256_add_epi32(sums[t], _mm256_madd_epi16(some[t], _mm256_set1_epi16(1))) : some[t];
}

// Inputs past the end of a group belong to the next one, so codes there must be worth nothing: zero for nibbles and bytes;
// for a table, whose entry 0 may be anything, the inputs are copied and filled up instead.
template <typename Code, int TOKENS>
INLINE void add_some(const Code& code, const uint8_t* row, const Inputs& in, int64_t at, int64_t count, __m256i* sums) {
  alignas(32) uint8_t bytes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), load_some(row + at, count));
  constexpr int PLANES = Code::PER_BYTE;
  alignas(32) int8_t copies[TOKENS][PLANES][32];
  Inputs few = in;
  for (int t = 0; t < TOKENS; ++t)
    for (int which = 0; which < PLANES; ++which) {
      const int8_t* x = PLANES == 4   ? in.quarters + (4 * t + which) * in.quarter
                        : PLANES == 2 ? in.halves + (2 * t + which) * in.half
                                      : in.values + t * in.stride;
      _mm256_store_si256(reinterpret_cast<__m256i*>(copies[t][which]), load_some(x + at, count));
    }
  few.quarters = few.halves = few.values = copies[0][0];
  few.quarter = few.half = few.stride = 32;
  add_registers<Code, TOKENS, 1>(code, bytes, few, 0, sums, at);
}

// Sums of the bytes [at, end) of a row.
template <typename Code, int TOKENS>
INLINE void add_range(const Code& code, const uint8_t* row, const Inputs& in, int64_t at, int64_t end, __m256i* sums) {
  for (; at + 128 <= end; at += 128) {
    fetch_ahead(row + at);
    fetch_ahead(row + at + 64);
    add_registers<Code, TOKENS, 4>(code, row, in, at, sums);
  }
  for (; at + 32 <= end; at += 32) add_registers<Code, TOKENS, 1>(code, row, in, at, sums);
  if (at < end) add_some<Code, TOKENS>(code, row, in, at, end - at, sums);
}

template <typename Code>
INLINE int32_t zero_of(const Weight& weight, const Inputs& in, int32_t row, int32_t group) {
  if (!Code::NARROW) return 0;
  if (weight.zeros == nullptr) return 8;
  const int32_t at = weight.scale_stride == 0 ? 0 : row;
  return weight.zeros[static_cast<int64_t>(at / 8) * in.groups + group] >> 4 * (at % 8) & 15;
}

// Four registers to one: 128-bit lane l of the result has the sums of lane l of a, b, c and d.
template <bool NARROW>
INLINE __m256i add_four(__m256i a, __m256i b, __m256i c, __m256i d) {
  __m256i ab, cd;
  if constexpr (NARROW) {
    const __m256i one = _mm256_set1_epi16(1);
    ab = _mm256_madd_epi16(_mm256_add_epi16(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)), one);
    cd = _mm256_madd_epi16(_mm256_add_epi16(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d)), one);
  } else {
    ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  }
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

// Scales of the eight groups of a row from `group` on.
INLINE __m256 load_scales(const Weight& weight, int32_t row, int32_t group) {
  const __m256 factor = _mm256_set1_ps(weight.scale_factor);
  const int64_t first = row * weight.scale_stride + group;
  const char* bytes = static_cast<const char*>(weight.scale);
  if (bytes_of(weight.scale_type) == 1)
    return _mm256_mul_ps(byte_numbers(weight.scale_type, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + first))), factor);
  if (weight.scale_type == Float::float32) return _mm256_mul_ps(_mm256_castsi256_ps(load(bytes + 4 * first)), factor);
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 2 * first));
  if (weight.scale_type == Float::float16) return _mm256_mul_ps(_mm256_cvtph_ps(halves), factor);
  return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)), factor);
}

// outputs += sums of the eight groups from `group` on, in order. Lanes are groups.
template <typename Code>
INLINE float accumulate(const Weight& weight, const Inputs& in, int32_t row, int32_t token, int32_t group, __m256i sums,
                        float out) {
  const int64_t at = static_cast<int64_t>(token) * in.groups + group;
  if constexpr (Code::NARROW) {
    __m256i zeros = _mm256_set1_epi32(8);
    if (weight.zeros != nullptr) {
      const int32_t from = weight.scale_stride == 0 ? 0 : row;
      const __m256i words = load(weight.zeros + static_cast<int64_t>(from / 8) * in.groups + group);
      zeros = _mm256_and_si256(_mm256_srl_epi32(words, _mm_cvtsi32_si128(4 * (from % 8))), _mm256_set1_epi32(15));
    }
    sums = _mm256_sub_epi32(sums, _mm256_mullo_epi32(zeros, load(in.sums + at)));
  }
  const __m256 ws = load_scales(weight, row, group);
  alignas(32) float value[BATCH], scale[BATCH];
  _mm256_store_ps(value, _mm256_cvtepi32_ps(sums));
  _mm256_store_ps(scale, _mm256_mul_ps(ws, _mm256_loadu_ps(in.scale + at)));
#pragma GCC unroll 8
  for (int i = 0; i < BATCH; ++i) out = __builtin_fmaf(value[i], scale[i], out);
  return out;
}

// Eight groups of a row at once. Of 16 bytes: two groups to a register.
template <typename Code, int TOKENS, int BYTES>
INLINE void add_batch(const Code& code, const Weight& weight, const Inputs& in, int32_t row, int32_t group, float* outputs) {
  constexpr int COUNT = BYTES == 16 ? 4 : 8, EACH = BYTES == 64 ? 2 : 1;
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  const int64_t first = static_cast<int64_t>(group) * BYTES;
  __m256i v[TOKENS][8];
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i) {
    const int64_t at = first + 32 * EACH * i;
    if (EACH == 2 || i % 2 == 0) fetch_ahead(bytes + at);
    __m256i sums[TOKENS];
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int j = 0; j < EACH; ++j) Code::template add<TOKENS>(code, load(bytes + at + 32 * j), in, at + 32 * j, sums, 0);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) v[t][i] = sums[t];
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) {
    const __m256i a = add_four<Code::NARROW>(v[t][0], v[t][1], v[t][2], v[t][3]);
    __m256i sums;
    if constexpr (COUNT == 4) {
      sums = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    } else {
      const __m256i b = add_four<Code::NARROW>(v[t][4], v[t][5], v[t][6], v[t][7]);
      sums = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    }
    outputs[t] = accumulate<Code>(weight, in, row, t, group, sums, outputs[t]);
  }
}

// Numbers of eight groups and as many tokens as there are, zeros for others, to a register for each group: lanes are tokens.
template <int TOKENS>
INLINE void by_token(const void* numbers, int32_t groups, __m256i* found) {
#pragma GCC unroll 8
  for (int t = 0; t < BATCH; ++t)
    found[t] = t < TOKENS ? load(static_cast<const int32_t*>(numbers) + static_cast<int64_t>(t) * groups) : _mm256_setzero_si256();
  transpose(found);
}

// Eight groups of `rows` rows and more than four tokens: lanes are tokens. `out`: a register a row.
template <typename Code, int TOKENS, int BYTES>
INLINE void add_many(const Code* codes, const Weight& weight, const Inputs& in, int32_t row, int32_t rows, int32_t group, __m256* out) {
  constexpr int EXACT = !Code::NARROW ? -1 : BYTES == 64 ? 1 : 2;  // 8 * 2 * 15 * 127 = 30480
  __m256i xs[BATCH], totals[BATCH];
  by_token<TOKENS>(in.scale + group, in.groups, xs);
  by_token<TOKENS>(in.sums + group, in.groups, totals);
  for (int32_t r = 0; r < rows; ++r) {
    const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + (row + r) * weight.row_bytes;
    alignas(32) float ws[BATCH];
    _mm256_store_ps(ws, load_scales(weight, row + r, group));
#pragma GCC unroll 1
    for (int g = 0; g < BATCH; ++g) {
      const int64_t at = static_cast<int64_t>(group + g) * BYTES;
      fetch_ahead(bytes + at);
      __m256i v[ROWS], found[2];
#pragma GCC unroll 8
      for (int t = 0; t < ROWS; ++t) v[t] = _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int j = 0; j < BYTES; j += 32) Code::template add<TOKENS>(codes[r], load(bytes + at + j), in, at + j, v, 0);
      add_lanes<EXACT, 32>(v, found);
      // Sums of inputs are below 2^15, zero points below 16.
      if constexpr (Code::NARROW)
        found[0] = _mm256_sub_epi32(found[0], _mm256_madd_epi16(_mm256_set1_epi32(zero_of<Code>(weight, in, row + r, group + g)), totals[g]));
      const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(ws[g]), _mm256_castsi256_ps(xs[g]));
      out[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found[0]), scale, out[r]);
    }
  }
}

// The same as far as there are eight groups at a time: returns how many groups there were.
template <typename Code, int TOKENS, int BYTES>
INLINE int32_t add_all(const Weight& weight, const Inputs& in, int32_t row, int32_t rows, float (*outputs)[TOKENS]) {
  Code codes[ROWS];
  for (int32_t r = 0; r < rows; ++r) codes[r] = Code::make(weight, row + r);
  __m256 out[ROWS];
  for (__m256& v : out) v = _mm256_setzero_ps();
  int32_t g = 0;
  for (; g + BATCH <= in.columns / in.group; g += BATCH) add_many<Code, TOKENS, BYTES>(codes, weight, in, row, rows, g, out);
  for (int32_t r = 0; r < rows; ++r) {
    alignas(32) float found[ROWS];
    _mm256_store_ps(found, out[r]);
    __builtin_memcpy(outputs[r], found, sizeof outputs[r]);
  }
  return g;
}

// BYTES 0: groups of any size. Outputs of a row += groups from `g` on.
template <typename Code, int TOKENS, int BYTES>
INLINE void add_row(const Code& code, const Weight& weight, const Inputs& in, int32_t row, int32_t g, float* out) {
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  if constexpr (BYTES != 0)
    for (; g + BATCH <= in.columns / in.group; g += BATCH) add_batch<Code, TOKENS, BYTES>(code, weight, in, row, g, out);
  for (; g < in.groups; ++g) {
    const int32_t end = least((g + 1) * in.group, in.columns);
    __m256i sums[TOKENS];
    for (__m256i& v : sums) v = _mm256_setzero_si256();
    add_range<Code, TOKENS>(code, bytes, in, g * in.group / Code::PER_BYTE, (end + Code::PER_BYTE - 1) / Code::PER_BYTE, sums);
    const float ws = scale_of(weight, row, g);
    const int32_t zero = zero_of<Code>(weight, in, row, g);
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t at = static_cast<int64_t>(t) * in.groups + g;
      out[t] = __builtin_fmaf(static_cast<float>(sum(sums[t]) - zero * in.sums[at]), ws * in.scale[at], out[t]);
    }
  }
}

template <typename Code, int TOKENS, int BYTES>
void multiply_rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  constexpr bool MANY = TOKENS > 4 && BYTES >= 32;
  constexpr bool SQUARES = Code::SQUARES && TOKENS == 1 && (BYTES == 8 || BYTES == 16);
  const bool squares = weight.scale_type != Float::float32 && weight.scale_stride != 0;
  for (int32_t row = first; row < last; row += ROWS) {
    const int32_t rows = least(last - row, ROWS);
    float out[ROWS][TOKENS] = {};
    int32_t g = 0;
    if constexpr (SQUARES)
      if (squares && rows == ROWS) g = add_squares<Code, BYTES>(weight, in, row, out);
    if constexpr (MANY) g = add_all<Code, TOKENS, BYTES>(weight, in, row, rows, out);
    for (int32_t r = 0; r < rows; ++r) {
      add_row<Code, TOKENS, MANY || BYTES == 8 ? 0 : BYTES>(Code::make(weight, row + r), weight, in, row + r, g, out[r]);
      for (int t = 0; t < TOKENS; ++t) outputs[t * in.rows + row + r] = out[r][t];
    }
  }
}

// A token's part of `in`.
INLINE Inputs inputs_of(const Inputs& in, int32_t token) {
  Inputs one = in;
  one.tokens = 1;
  one.values += token * in.stride;
  one.halves += 2 * token * in.half;
  one.quarters += 4 * token * in.quarter;
  one.scale += static_cast<int64_t>(token) * in.groups;
  one.sums += static_cast<int64_t>(token) * in.groups;
  return one;
}

// Groups of 8 bytes, one token after the other.
template <typename Code>
void multiply_eights(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  for (int32_t row = first; row < last; row += ROWS)
    for (int t = 0; t < in.tokens; ++t)
      multiply_rows<Code, 1, Code::SQUARES ? 8 : 0>(weight, inputs_of(in, t), row, least(row + ROWS, last), outputs + t * in.rows);
}

template <typename Code, int TOKENS>
INLINE void by_group(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  switch (in.group % Code::PER_BYTE == 0 ? in.group / Code::PER_BYTE : 0) {
    case 8: return multiply_eights<Code>(weight, in, first, last, outputs);
    case 16: return multiply_rows<Code, TOKENS, 16>(weight, in, first, last, outputs);
    case 32: return multiply_rows<Code, TOKENS, 32>(weight, in, first, last, outputs);
    case 64: return multiply_rows<Code, TOKENS, 64>(weight, in, first, last, outputs);
    default: return multiply_rows<Code, TOKENS, 0>(weight, in, first, last, outputs);
  }
}

template <typename Code>
void multiply(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  if constexpr (SMALL_CODE) {
    Inputs one = in;
    one.tokens = 1;
    for (int64_t t = 0; t < in.tokens; ++t) {
      one.values = in.values + t * in.stride;
      one.halves = in.halves + 2 * t * in.half;
      one.quarters = in.quarters + 4 * t * in.quarter;
      one.scale = in.scale + t * in.groups;
      one.sums = in.sums + t * in.groups;
      by_group<Code, 1>(weight, one, first, last, outputs + t * in.rows);
    }
  } else {
    switch (in.tokens) {
      case 1: return by_group<Code, 1>(weight, in, first, last, outputs);
      case 2: return by_group<Code, 2>(weight, in, first, last, outputs);
      case 3: return by_group<Code, 3>(weight, in, first, last, outputs);
      case 4: return by_group<Code, 4>(weight, in, first, last, outputs);
      case 5: return by_group<Code, 5>(weight, in, first, last, outputs);
      case 6: return by_group<Code, 6>(weight, in, first, last, outputs);
      case 7: return by_group<Code, 7>(weight, in, first, last, outputs);
      default: return by_group<Code, 8>(weight, in, first, last, outputs);
    }
  }
}

}  // namespace
}  // namespace quern
