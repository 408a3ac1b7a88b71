// Products of rows and few tokens for codes that lie along the rows: each lane of vpdpbusd adds four neighbouring products,
// and the 16 lanes of a group are added at its end.
//
// vpdpbusd takes unsigned codes, so values are shifted: 4-bit integers are used as stored, entries of a 4-bit table and
// 8-bit integers plus 128. The shift times the group's sum of inputs is subtracted afterwards, together with the zero
// point. 4-bit codes are split into low nibbles, which meet the inputs of even columns, and high ones.
//
// Groups of 8, 16, 32 and 64 bytes are added 16 groups at a time, by exchanging lanes between their registers; all other
// sizes, and what is left at the end of a row, one at a time.
//
// No include guard and no linkage: for <kind>_avx512.cc alone. Such a file says in a struct `Code` how its codes become
// unsigned bytes and which inputs they meet: PER_BYTE codes a byte, in so many REGISTERS, values plus SHIFT (0: as stored, less
// the zero point). `make` looks at a row, `tables` at the register from byte `at` of it on, for the `codes` in that.
#include "kernels/common_avx512.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

constexpr int32_t BATCH = 16;  // groups that are added together
constexpr int FAR = 4096;      // of fetch_ahead

struct NoTables {};

// Inputs of one token that the codes from byte `at` of a row on meet.
template <typename Code>
INLINE const int8_t* inputs_at(const Inputs& in, int token, int which, int64_t at) {
  if constexpr (Code::PER_BYTE == 4) return in.quarters + (4 * token + which) * in.quarter + at;
  if constexpr (Code::PER_BYTE == 2) return in.halves + (2 * token + which) * in.half + at;
  return in.values + token * in.stride + at;
}

template <typename Code, int TOKENS>
INLINE void add(const Code& code, const Inputs& in, __m512i bytes, int64_t at, __m512i* sums) {
  const auto tables = Code::tables(code, at);
#pragma GCC unroll 4
  for (int which = 0; which < Code::REGISTERS; ++which) {
    const __m512i codes = Code::codes(code, tables, bytes, which, at);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
      sums[t] = _mm512_dpbusd_epi32(sums[t], codes, _mm512_loadu_si512(inputs_at<Code>(in, t, which, at)));
  }
}

// The same for fewer than 64 bytes. Bytes that are masked out may become a code other than zero, so their inputs must be.
template <typename Code, int TOKENS>
INLINE void add_some(const Code& code, const Inputs& in, const uint8_t* row, int64_t at, int64_t count, __m512i* sums) {
  const __mmask64 some = first_bytes(count);
  const __m512i bytes = _mm512_maskz_loadu_epi8(some, row + at);
  const auto tables = Code::tables(code, at);
  for (int which = 0; which < Code::REGISTERS; ++which) {
    const __m512i codes = Code::codes(code, tables, bytes, which, at);
    for (int t = 0; t < TOKENS; ++t)
      sums[t] = _mm512_dpbusd_epi32(sums[t], codes, _mm512_maskz_loadu_epi8(some, inputs_at<Code>(in, t, which, at)));
  }
}

// Sums of the bytes [at, end) of a row, lane by lane.
template <typename Code, int TOKENS>
INLINE void add_range(const Code& code, const Inputs& in, const uint8_t* row, int64_t at, int64_t end, __m512i* sums) {
  constexpr int CHAINS = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;  // vpdpbusd takes five cycles
  __m512i more[CHAINS][TOKENS];
  for (auto& chain : more)
    for (__m512i& v : chain) v = _mm512_setzero_si512();
  for (; at + 64 * CHAINS <= end; at += 64 * CHAINS)
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; ++i) {
      add<Code, TOKENS>(code, in, load_once(row + at + 64 * i), at + 64 * i, more[i]);
      fetch_ahead<FAR>(row + at + 64 * i);
    }
  for (; at + 64 <= end; at += 64) add<Code, TOKENS>(code, in, _mm512_loadu_si512(row + at), at, more[0]);
  if (at < end) add_some<Code, TOKENS>(code, in, row, at, end - at, more[0]);
  for (int t = 0; t < TOKENS; ++t) {
    sums[t] = more[0][t];
    for (int i = 1; i < CHAINS; ++i) sums[t] = _mm512_add_epi32(sums[t], more[i][t]);
  }
}

struct Zeros {
  const int32_t* words;  // of the row's eight rows, by group; null: all are 8
  int shift;
};

INLINE Zeros zeros_of(const Weight& weight, const Inputs& in, int32_t row) {
  const int32_t at = weight.scale_stride == 0 ? 0 : row;
  if (weight.zeros == nullptr) return {nullptr, 0};
  return {weight.zeros + static_cast<int64_t>(at / 8) * in.groups, 4 * (at % 8)};
}

// Scales and zero points are short streams of their own, which the processor's prefetchers take too late. A batch fetches
// the scales that are wanted eight batches later, and the zero points of the next eight rows.
INLINE void fetch_scales(const Weight& weight, const Inputs& in, const Zeros& zeros, int32_t row, int32_t group) {
  const int64_t size = bytes_of(weight.scale_type);
  _mm_prefetch(static_cast<const char*>(weight.scale) + (row * weight.scale_stride + group + 8 * BATCH) * size, _MM_HINT_T0);
  if (zeros.words != nullptr) _mm_prefetch(reinterpret_cast<const char*>(zeros.words + group + in.groups), _MM_HINT_T0);
}

// What codes were shifted by, for the groups from `group` on.
template <typename Code>
INLINE __m512i shifts(const Zeros& zeros, int32_t group, __mmask16 some) {
  if constexpr (Code::SHIFT != 0) return _mm512_set1_epi32(Code::SHIFT);
  if (zeros.words == nullptr) return _mm512_set1_epi32(8);
  const __m512i words = _mm512_maskz_loadu_epi32(some, zeros.words + group);
  return _mm512_and_si512(_mm512_srl_epi32(words, _mm_cvtsi32_si128(zeros.shift)), _mm512_set1_epi32(15));
}

// outputs += sums of up to 16 groups, in order. Lanes are groups.
template <typename Code>
INLINE float accumulate(const Weight& weight, const Inputs& in, const Zeros& zeros, int32_t row, int32_t token, int32_t group,
                        int32_t count, __m512i sums, float out) {
  const __mmask16 some = first_lanes(count);
  const int64_t at = static_cast<int64_t>(token) * in.groups + group;
  const __m512i shift = _mm512_mullo_epi32(shifts<Code>(zeros, group, some), _mm512_maskz_loadu_epi32(some, in.sums + at));
  const __m512 ws = load_scales(weight, row, group, some);
  alignas(64) float value[BATCH], scale[BATCH];
  _mm512_store_ps(value, _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, shift)));
  _mm512_store_ps(scale, _mm512_mul_ps(ws, _mm512_maskz_loadu_ps(some, in.scale + at)));
  if (count == BATCH) {
#pragma GCC unroll 16
    for (int i = 0; i < BATCH; ++i) out = __builtin_fmaf(value[i], scale[i], out);
  } else {
    for (int i = 0; i < count; ++i) out = __builtin_fmaf(value[i], scale[i], out);
  }
  return out;
}

// Four registers to one: 128-bit lane l of the result has the sums of lane l of a, b, c and d.
template <bool NARROW>
INLINE __m512i add_four(__m512i a, __m512i b, __m512i c, __m512i d) {
  if constexpr (NARROW) {  // a lane is at most 8 * 15 * 127, two are, and fit 16 bits, which are added in pairs at once
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i ab = _mm512_madd_epi16(_mm512_packs_epi32(a, b), one), cd = _mm512_madd_epi16(_mm512_packs_epi32(c, d), one);
    return _mm512_madd_epi16(_mm512_packs_epi32(ab, cd), one);
  }
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// Sums of 16 groups of `LANES_A_GROUP` lanes, that is of 16, 8, 4 or 2 registers.
template <int LANES_A_GROUP, bool NARROW>
INLINE __m512i add_lanes(const __m512i* v) {
  if constexpr (LANES_A_GROUP == 2) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_permutex2var_epi32(v[0], even, v[1]), _mm512_permutex2var_epi32(v[0], odd, v[1]));
  } else if constexpr (LANES_A_GROUP == 4) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, add_four<NARROW>(v[0], v[1], v[2], v[3]));
  } else if constexpr (LANES_A_GROUP == 8) {
    const __m512i a = add_four<NARROW>(v[0], v[1], v[2], v[3]), b = add_four<NARROW>(v[4], v[5], v[6], v[7]);
    const __m512i both = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return _mm512_permutexvar_epi32(order, both);
  } else {
    const __m512i a = add_four<NARROW>(v[0], v[1], v[2], v[3]), b = add_four<NARROW>(v[4], v[5], v[6], v[7]);
    const __m512i c = add_four<NARROW>(v[8], v[9], v[10], v[11]), d = add_four<NARROW>(v[12], v[13], v[14], v[15]);
    const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
    const __m512i cd = _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x44), _mm512_shuffle_i32x4(c, d, 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
  }
}

// 16 groups of a row at once.
template <typename Code, int TOKENS, int LANES_A_GROUP>
INLINE void add_batch(const Code& code, const Weight& weight, const Inputs& in, const Zeros& zeros, int32_t row,
                      int32_t group, float* outputs) {
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  const int64_t at = static_cast<int64_t>(group) * LANES_A_GROUP * 4;
  fetch_scales(weight, in, zeros, row, group);
  __m512i v[TOKENS][LANES_A_GROUP];
#pragma GCC unroll 16
  for (int i = 0; i < LANES_A_GROUP; ++i) {
    __m512i sums[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_setzero_si512();
    add<Code, TOKENS>(code, in, load_once(bytes + at + 64 * i), at + 64 * i, sums);
    fetch_ahead<FAR>(bytes + at + 64 * i);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) v[t][i] = sums[t];
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t)
    outputs[t] = accumulate<Code>(weight, in, zeros, row, t, group, BATCH, add_lanes<LANES_A_GROUP, Code::SHIFT == 0>(v[t]), outputs[t]);
}

// The last groups of a row, fewer than 16, the very last of them perhaps shorter. `end` is the row's end in bytes.
template <typename Code, int TOKENS, int LANES_A_GROUP>
INLINE void add_rest(const Code& code, const Weight& weight, const Inputs& in, const Zeros& zeros, int32_t row, int32_t group,
                     int64_t end, float* outputs) {
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  __m512i v[TOKENS][LANES_A_GROUP];
#pragma GCC unroll 16
  for (int i = 0; i < LANES_A_GROUP; ++i) {
    const int64_t at = static_cast<int64_t>(group) * LANES_A_GROUP * 4 + 64 * i;
    __m512i sums[TOKENS];
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_setzero_si512();
    if (at + 64 <= end) {
      fetch_ahead<FAR>(bytes + at);
      add<Code, TOKENS>(code, in, _mm512_loadu_si512(bytes + at), at, sums);
    } else if (at < end) {
      add_some<Code, TOKENS>(code, in, bytes, at, end - at, sums);
    }
    for (int t = 0; t < TOKENS; ++t) v[t][i] = sums[t];
  }
  for (int t = 0; t < TOKENS; ++t)
    outputs[t] = accumulate<Code>(weight, in, zeros, row, t, group, in.groups - group,
                                  add_lanes<LANES_A_GROUP, Code::SHIFT == 0>(v[t]), outputs[t]);
}

// ROWS rows side by side, so that their chains of float additions overlap. LANES_A_GROUP 0: groups of any size.
template <typename Code, int TOKENS, int LANES_A_GROUP, int ROWS>
INLINE void multiply_block(const Weight& weight, const Inputs& in, int32_t row, float* outputs) {
  float out[ROWS][TOKENS] = {};
  Zeros zeros[ROWS];
  Code code[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    zeros[r] = zeros_of(weight, in, row + r);
    code[r] = Code::make(weight, row + r);
  }
  int32_t group = 0;
  if constexpr (LANES_A_GROUP != 0) {
    const int32_t whole = in.columns / in.group;
    for (; group + BATCH <= whole; group += BATCH)
      for (int r = 0; r < ROWS; ++r)
        add_batch<Code, TOKENS, LANES_A_GROUP>(code[r], weight, in, zeros[r], row + r, group, out[r]);
    const int64_t end = (in.columns + Code::PER_BYTE - 1) / Code::PER_BYTE;
    if (group < in.groups) {
      for (int r = 0; r < ROWS; ++r)
        add_rest<Code, TOKENS, LANES_A_GROUP>(code[r], weight, in, zeros[r], row + r, group, end, out[r]);
      group = in.groups;
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + (row + r) * weight.row_bytes;
    for (int32_t g = group; g < in.groups; ++g) {
      const int32_t end = least((g + 1) * in.group, in.columns);
      __m512i sums[TOKENS];
      add_range<Code, TOKENS>(code[r], in, bytes, g * in.group / Code::PER_BYTE, (end + Code::PER_BYTE - 1) / Code::PER_BYTE, sums);
      for (int t = 0; t < TOKENS; ++t) {
        const __m512i total = _mm512_castsi128_si512(_mm_cvtsi32_si128(_mm512_reduce_add_epi32(sums[t])));
        out[r][t] = accumulate<Code>(weight, in, zeros[r], row + r, t, g, 1, total, out[r][t]);
      }
    }
    for (int t = 0; t < TOKENS; ++t) outputs[t * in.rows + row + r] = out[r][t];
  }
}

template <typename Code, int TOKENS, int LANES_A_GROUP>
void multiply_rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  // Only the smallest groups have so many additions that the time of one shows.
  constexpr int ROWS = TOKENS > 1 ? 1 : LANES_A_GROUP == 2 ? 4 : LANES_A_GROUP == 4 && Code::PER_BYTE < 4 ? 2 : 1;
  int32_t row = first;
  for (; row + ROWS <= last; row += ROWS)
    multiply_block<Code, TOKENS, LANES_A_GROUP, ROWS>(weight, in, row, outputs);
  for (; row < last; ++row) multiply_block<Code, TOKENS, LANES_A_GROUP, 1>(weight, in, row, outputs);
}

template <typename Code, int TOKENS>
INLINE void by_group(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  const int32_t bytes = in.group % Code::PER_BYTE == 0 ? in.group / Code::PER_BYTE : 0;
  switch (bytes) {
    case 8: return multiply_rows<Code, TOKENS, 2>(weight, in, first, last, outputs);
    case 16: return multiply_rows<Code, TOKENS, 4>(weight, in, first, last, outputs);
    case 32: return multiply_rows<Code, TOKENS, 8>(weight, in, first, last, outputs);
    case 64: return multiply_rows<Code, TOKENS, 16>(weight, in, first, last, outputs);
    default: return multiply_rows<Code, TOKENS, 0>(weight, in, first, last, outputs);
  }
}

template <typename Code>
void multiply(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
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

}  // namespace
}  // namespace quern
