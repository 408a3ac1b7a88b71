// Products of rows and few tokens for codes that lie along the rows: each lane of vpdpbusd adds four neighbouring products,
// and the 16 lanes of a group are added at its end.
//
// vpdpbusd takes unsigned codes, so values are shifted: 4-bit integers are used as stored, entries of a 4-bit table and
// 8-bit integers plus 128. The shift times the group's sum of inputs is subtracted afterwards, together with the zero
// point. 4-bit codes are split into low nibbles, which meet the inputs of even columns, and high ones.
//
// Groups of 8, 16, 32 and 64 bytes are taken of 16 rows side by side. Exchanging lanes between the registers of these rows adds
// the lanes of a group and leaves a row in each lane, where one instruction does for 16 groups what follows: the chain of
// float additions along the groups of a row is one of registers. A few registers of each row are taken at a time, so that
// memory is read in short runs and the sums wait in the L1 cache; what the next turn takes is fetched meanwhile. Groups of
// all other sizes are added one after the other, a row at a time.
//
// No include guard and no linkage: for <kind>_avx512.cc alone. Such a file says in a struct `Code` how its codes become
// unsigned bytes and which inputs they meet: PER_BYTE codes a byte, in so many REGISTERS, values plus SHIFT (0: as stored, less
// the zero point). `make` looks at a row, `tables` at the register from byte `at` of it on, for the `codes` in that.
#include "kernels/common_avx512.h"
#include "kinds/kinds.h"
#include "kinds/scales_avx512-inl.h"

namespace quern {
namespace {

constexpr int FAR = 4096;          // of fetch_ahead
constexpr int64_t FAR_ROWS = 512;  // bytes from what is taken of a row to what is fetched of it, with ROWS side by side

struct NoTables {};

// Fetches `count` bytes from byte `at` of a row on.
INLINE void fetch(const uint8_t* row, int64_t at, int count) {
  for (int i = 0; i < count; i += 64) _mm_prefetch(reinterpret_cast<const char*>(row + at + i), _MM_HINT_T1);
}

// Inputs that codes meet, by token and register.
template <typename Code, int TOKENS>
struct Met {
  const int8_t* from[TOKENS][Code::REGISTERS];
};

// Those that the codes from byte `at` of a row on meet.
template <typename Code, int TOKENS>
INLINE Met<Code, TOKENS> inputs_at(const Inputs& in, int64_t at) {
  Met<Code, TOKENS> x;
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
    for (int which = 0; which < Code::REGISTERS; ++which) {
      const int8_t* from = in.values + t * in.stride;
      if constexpr (Code::PER_BYTE == 4) from = in.quarters + (4 * t + which) * in.quarter;
      if constexpr (Code::PER_BYTE == 2) from = in.halves + (2 * t + which) * in.half;
      x.from[t][which] = from + at;
    }
  return x;
}

// The register of codes from byte `at` of a row on, `offset` bytes behind where `x` begins.
template <typename Code, int TOKENS>
INLINE void add(const Code& code, const Met<Code, TOKENS>& x, __m512i bytes, int64_t at, int offset, __m512i* sums) {
  const auto tables = Code::tables(code, at);
#pragma GCC unroll 4
  for (int which = 0; which < Code::REGISTERS; ++which) {
    const __m512i codes = Code::codes(code, tables, bytes, which, at);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
      sums[t] = _mm512_dpbusd_epi32(sums[t], codes, _mm512_loadu_si512(x.from[t][which] + offset));
  }
}

// The same for fewer than 64 bytes. Bytes that are masked out may become a code other than zero, so their inputs must be.
template <typename Code, int TOKENS>
INLINE void add_some(const Code& code, const Inputs& in, const uint8_t* row, int64_t at, int64_t count, __m512i* sums) {
  const __mmask64 some = first_bytes(count);
  const __m512i bytes = _mm512_maskz_loadu_epi8(some, row + at);
  const auto tables = Code::tables(code, at);
  const Met<Code, TOKENS> x = inputs_at<Code, TOKENS>(in, at);
  for (int which = 0; which < Code::REGISTERS; ++which) {
    const __m512i codes = Code::codes(code, tables, bytes, which, at);
    for (int t = 0; t < TOKENS; ++t)
      sums[t] = _mm512_dpbusd_epi32(sums[t], codes, _mm512_maskz_loadu_epi8(some, x.from[t][which]));
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
      add<Code, TOKENS>(code, inputs_at<Code, TOKENS>(in, at), load_once(row + at + 64 * i), at + 64 * i, 64 * i, more[i]);
      fetch_ahead<FAR>(row + at + 64 * i);
    }
  for (; at + 64 <= end; at += 64)
    add<Code, TOKENS>(code, inputs_at<Code, TOKENS>(in, at), _mm512_loadu_si512(row + at), at, 0, more[0]);
  if (at < end) add_some<Code, TOKENS>(code, in, row, at, end - at, more[0]);
  for (int t = 0; t < TOKENS; ++t) {
    sums[t] = more[0][t];
    for (int i = 1; i < CHAINS; ++i) sums[t] = _mm512_add_epi32(sums[t], more[i][t]);
  }
}

// Where the lines lie that come after position `at` of each of ROWS rows of `end` bytes, `far` bytes later: beyond the end in the
// ROWS rows that come next.
struct Ahead {
  int64_t rows, at;
};

INLINE Ahead ahead_of(int64_t at, int64_t far, int64_t end) {
  return at + far < end ? Ahead{0, at + far} : Ahead{ROWS, at + far - end};
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

// Double words of two registers, in each 128-bit lane the even or the odd ones.
template <int FIRST>
INLINE __m512i every_second(__m512i a, __m512i b) {
  return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), FIRST == 0 ? 0x88 : 0xdd));
}

// 128-bit lane l of four registers into register l of the result, whose registers are `step` apart.
INLINE void exchange_lanes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out, int step) {
  const __m512i even_ab = _mm512_shuffle_i32x4(a, b, 0x88), odd_ab = _mm512_shuffle_i32x4(a, b, 0xdd);
  const __m512i even_cd = _mm512_shuffle_i32x4(c, d, 0x88), odd_cd = _mm512_shuffle_i32x4(c, d, 0xdd);
  out[0] = _mm512_shuffle_i32x4(even_ab, even_cd, 0x88);
  out[step] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0x88);
  out[2 * step] = _mm512_shuffle_i32x4(even_ab, even_cd, 0xdd);
  out[3 * step] = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0xdd);
}

// Registers of 16 rows, each with 16 / LANES_A_GROUP groups, into sums of these groups, whose lanes are the rows.
template <int LANES_A_GROUP, bool NARROW>
INLINE void add_lanes(const __m512i* v, __m512i* out) {
  if constexpr (LANES_A_GROUP == 2) {
    __m512i pairs[8], even[4], odd[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      pairs[i] = _mm512_add_epi32(every_second<0>(v[2 * i], v[2 * i + 1]), every_second<1>(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      even[i] = every_second<0>(pairs[2 * i], pairs[2 * i + 1]);
      odd[i] = every_second<1>(pairs[2 * i], pairs[2 * i + 1]);
    }
    exchange_lanes(even[0], even[1], even[2], even[3], out, 2);
    exchange_lanes(odd[0], odd[1], odd[2], odd[3], out + 1, 2);
    return;
  }
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) four[i] = add_four<NARROW>(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  if constexpr (LANES_A_GROUP == 4) return exchange_lanes(four[0], four[1], four[2], four[3], out, 1);
  __m512i two[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i a = four[2 * i], b = four[2 * i + 1];
    two[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }
  const __m512i even = _mm512_shuffle_i32x4(two[0], two[1], 0x88), odd = _mm512_shuffle_i32x4(two[0], two[1], 0xdd);
  if constexpr (LANES_A_GROUP == 8) {
    out[0] = even;
    out[1] = odd;
  } else {
    out[0] = _mm512_add_epi32(even, odd);
  }
}

// Up to 16 rows and few tokens, for groups of LANES_A_GROUP lanes.
template <typename Code, int TOKENS, int LANES_A_GROUP>
struct Block {
  static constexpr int GROUPS = 16 / LANES_A_GROUP;  // of a register
  // Registers of a row that are taken before the next row's. Their sums shall stay in the L1 cache.
  static constexpr int MOST = TOKENS <= 4 ? 4 : 2, REGISTERS = LANES_A_GROUP < MOST ? LANES_A_GROUP : MOST;

  const Weight& weight;
  const Inputs in;
  int32_t row, rows;
  Zeros zeros;
  Code code[ROWS];
  __m512i sums[TOKENS][REGISTERS][ROWS];
  // Of a batch:
  __m512 ws[BATCH];
  float xs[TOKENS][BATCH];
  int32_t shift[TOKENS][BATCH];
  int32_t words[WORDS][BATCH];

  Block(const Weight& w, const Inputs& inputs, int32_t first_row, int32_t count)
      : weight(w), in(inputs), row(first_row), rows(count), zeros(zeros_of(w, first_row, count)) {
    for (int r = 0; r < rows; ++r) code[r] = Code::make(weight, row + r);
    if (rows == ROWS) return;
    for (auto& token : sums)
      for (auto& line : token)
        for (__m512i& v : line) v = _mm512_setzero_si512();
  }

  // Scales and zero points are short streams of their own, which the processor's prefetchers take too late. They are fetched
  // into the L2 cache: 16 lines on their way from memory are all that may be on their way to the L1 cache.
  INLINE void load_batch(Block& self, int32_t group) {
    const Weight weight = self.weight;
    const int32_t groups = self.in.groups, row = self.row, rows = self.rows;
    const __mmask16 some = first_lanes(groups - group);
    const int64_t size = bytes_of(weight.scale_type), stride = weight.scale_stride * size;
    if (group * size % 64 == 0) {
      const Ahead next = ahead_of(group * size, 64, groups * size);
      const char* line = static_cast<const char*>(weight.scale) + (row + next.rows) * stride + next.at;
      for (int r = 0; r < ROWS; ++r) _mm_prefetch(line + r * stride, _MM_HINT_T1);
    }
    load_scales_of_rows(weight, row, rows, group, least(groups - group, BATCH), self.ws);
    if (self.zeros.words != nullptr) {
      load_zeros(self.zeros, groups, group, least(groups - group, BATCH), self.words);
      const int32_t* words = self.zeros.words + group + 2 * groups;
      _mm_prefetch(reinterpret_cast<const char*>(words), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(words + groups), _MM_HINT_T1);
    }
    // Zero points that lie in words are different in each row.
    const int factor = Code::SHIFT != 0 ? Code::SHIFT : self.zeros.words != nullptr ? 1 : 8;
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t at = static_cast<int64_t>(t) * groups + group;
      _mm512_storeu_ps(self.xs[t], _mm512_maskz_loadu_ps(some, self.in.scale + at));
      const __m512i total = _mm512_maskz_loadu_epi32(some, self.in.sums + at);
      _mm512_storeu_si512(self.shift[t], _mm512_mullo_epi32(total, _mm512_set1_epi32(factor)));
    }
    asm("" : "+m"(self.shift), "+m"(self.words));  // to be read from memory into all lanes, not from a register
  }

  // Sums of REGISTERS registers of each row from byte `at` on, lane by lane.
  INLINE void add_registers(Block& self, int64_t at) {
    const Inputs in = self.in;
    const int64_t stride = self.weight.row_bytes, end = (in.columns + Code::PER_BYTE - 1) / Code::PER_BYTE;
    const Ahead next = ahead_of(at, FAR_ROWS, end);
    const int32_t rows = self.rows;
    const uint8_t* bytes = static_cast<const uint8_t*>(self.weight.codes) + self.row * stride;
    Met<Code, TOKENS> x = inputs_at<Code, TOKENS>(in, at);
    if constexpr (TOKENS == 1)  // or the compiler holds pointers for each register and runs out of its own
      for (const int8_t*& from : x.from[0]) asm("" : "+r"(from));
    if (at + 64 * REGISTERS <= end) {
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r, bytes += stride) {
        Code::fetch(self.code[r], bytes + next.rows * stride, next.at, 64 * REGISTERS);
        const Code code = self.code[r];
#pragma GCC unroll 8
        for (int i = 0; i < REGISTERS; ++i) {
          __m512i v[TOKENS];
          for (int t = 0; t < TOKENS; ++t) v[t] = _mm512_setzero_si512();
          add<Code, TOKENS>(code, x, load_once(bytes + at + 64 * i), at + 64 * i, 64 * i, v);
          for (int t = 0; t < TOKENS; ++t) self.sums[t][i][r] = v[t];
        }
      }
      return;
    }
    for (int r = 0; r < rows; ++r, bytes += stride) {
      Code::fetch(self.code[r], bytes + next.rows * stride, next.at, 64 * REGISTERS);
#pragma GCC unroll 1
      for (int i = 0; i < REGISTERS; ++i) {
        __m512i v[TOKENS];
        for (int t = 0; t < TOKENS; ++t) v[t] = _mm512_setzero_si512();
        const int64_t from = at + 64 * i;
        if (from < end) add_some<Code, TOKENS>(self.code[r], in, bytes, from, end - from, v);
        for (int t = 0; t < TOKENS; ++t) self.sums[t][i][r] = v[t];
      }
    }
  }

  // out += sums of the group with number `place` in the batch.
  INLINE __m512 add_group(const Block& self, int t, int place, __m512i sum, __m512 out) {
    __m512i shift = _mm512_set1_epi32(self.shift[t][place]);
    if (Code::SHIFT == 0 && self.zeros.words != nullptr)
      shift = _mm512_mullo_epi32(shift, zeros_at(self.zeros, self.words, place));
    const __m512 scale = _mm512_mul_ps(self.ws[place], _mm512_set1_ps(self.xs[t][place]));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, shift)), scale, out);
  }

  INLINE void multiply(Block& self, float* outputs) {
    const int32_t groups = self.in.groups;
    __m512 out[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) out[t] = _mm512_setzero_ps();
    for (int32_t first = 0; first < groups; first += BATCH) {
      load_batch(self, first);
      const int count = least(groups - first, BATCH);
      for (int i = 0; i < count; i += REGISTERS * GROUPS) {
        add_registers(self, static_cast<int64_t>(first + i) * LANES_A_GROUP * 4);
#pragma GCC unroll 1
        for (int place = i; place < i + REGISTERS * GROUPS; place += GROUPS)
#pragma GCC unroll 8
          for (int t = 0; t < TOKENS; ++t) {
            __m512i sums[GROUPS];
            add_lanes<LANES_A_GROUP, Code::SHIFT == 0>(self.sums[t][(place - i) / GROUPS], sums);
#pragma GCC unroll 8
            for (int g = 0; g < GROUPS; ++g)
              if (place + g < count) out[t] = add_group(self, t, place + g, sums[g], out[t]);
          }
      }
    }
    for (int t = 0; t < TOKENS; ++t)
      _mm512_mask_storeu_ps(outputs + t * self.in.rows + self.row, first_lanes(self.rows), out[t]);
  }
};

// Groups of any size.
template <typename Code, int TOKENS>
INLINE void multiply_row(const Weight& weight, const Inputs& in, int32_t row, float* outputs) {
  const Code code = Code::make(weight, row);
  const Zeros zeros = zeros_of(weight, row, 1);
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  float out[TOKENS] = {};
  for (int32_t g = 0; g < in.groups; ++g) {
    const int32_t end = least((g + 1) * in.group, in.columns);
    __m512i sums[TOKENS];
    add_range<Code, TOKENS>(code, in, bytes, g * in.group / Code::PER_BYTE, (end + Code::PER_BYTE - 1) / Code::PER_BYTE, sums);
    const float ws = _mm512_cvtss_f32(load_scales(weight, row, g, 1));
    const int32_t zero = zeros.words == nullptr ? 8 : zeros.words[g] >> _mm512_cvtsi512_si32(zeros.shift) & 15;
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t at = static_cast<int64_t>(t) * in.groups + g;
      const int32_t sum = _mm512_reduce_add_epi32(sums[t]) - (Code::SHIFT != 0 ? Code::SHIFT : zero) * in.sums[at];
      out[t] = __builtin_fmaf(static_cast<float>(sum), ws * in.scale[at], out[t]);
    }
  }
  for (int t = 0; t < TOKENS; ++t) outputs[t * in.rows + row] = out[t];
}

template <typename Code, int TOKENS, int LANES_A_GROUP>
void multiply_rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  if constexpr (LANES_A_GROUP == 0) {
    for (int32_t row = first; row < last; ++row) multiply_row<Code, TOKENS>(weight, in, row, outputs);
  } else {
    using B = Block<Code, TOKENS, LANES_A_GROUP>;
    for (int32_t row = first; row < last; row += ROWS) {
      B block(weight, in, row, least(last - row, ROWS));
      B::multiply(block, outputs);
    }
  }
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
