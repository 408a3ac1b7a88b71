// Panels of decoded weights times many tokens, without matrix tiles: vpdpbusd multiplies a register of 16 rows x 4 columns
// by four inputs of one token. Weights are the unsigned operand, shifted by 128. A block of 4 x 6 accumulators needs ten
// loads for 24 products.
#include "kernels/common_avx512.h"
#include "kernels/tables.h"

namespace quern {
namespace {

constexpr int ROW_GROUPS = 4, TOKENS = 6;  // of a block of accumulators

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

INLINE __m512i four_inputs(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// sums[r][t] += products of `blocks` registers from `panel` on.
template <int R, int T>
INLINE void accumulate(const int8_t* panel, int64_t row_group_bytes, int32_t blocks, const int8_t* x, int64_t stride,
                       __m512i (&sums)[R][T]) {
  for (int32_t b = 0; b < blocks; ++b) {
    __m512i w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] = _mm512_loadu_si512(panel + r * row_group_bytes + 64 * b);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m512i v = four_inputs(x + t * stride + 4 * b);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], w[r], v);
    }
  }
}

struct Sums {
  const int8_t* panel;
  int32_t blocks;
  const int8_t* x;
  int64_t stride;
  int32_t tokens;
  int32_t* sums;

  template <int R, int T>
  INLINE void block(const Sums& s, int32_t row_group, int32_t token) {
    const int64_t bytes = static_cast<int64_t>(s.blocks) * LANES;
    __m512i total[R][T];
    int32_t* out = s.sums + (static_cast<int64_t>(row_group) * s.tokens + token) * 16;
    const int64_t step = static_cast<int64_t>(s.tokens) * 16;
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) total[r][t] = _mm512_loadu_si512(out + r * step + 16 * t);
    accumulate<R, T>(s.panel + row_group * bytes, bytes, s.blocks, s.x + token * s.stride, s.stride, total);
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) _mm512_storeu_si512(out + r * step + 16 * t, total[r][t]);
  }
};

// As above, but every group's sums go to floats at its end.
struct Groups {
  const int8_t* panel;
  int32_t blocks, group, groups;
  const int8_t* x;
  int64_t stride;
  int32_t tokens;
  const float* ws;
  const float* xs;
  const int32_t* xsum;
  int64_t token_stride;
  float* out;

  template <int R, int T>
  INLINE void block(const Groups& s, int32_t row_group, int32_t token) {
    const int64_t bytes = static_cast<int64_t>(s.blocks) * LANES, step = static_cast<int64_t>(s.tokens) * 16;
    float* out = s.out + (static_cast<int64_t>(row_group) * s.tokens + token) * 16;
    for (int32_t g = 0; g < s.groups; ++g) {
      __m512i total[R][T];
      for (int t = 0; t < T; ++t) {
        const __m512i shift = _mm512_set1_epi32(-128 * s.xsum[(token + t) * s.token_stride + g]);
        for (int r = 0; r < R; ++r) total[r][t] = shift;
      }
      accumulate<R, T>(s.panel + row_group * bytes + static_cast<int64_t>(g) * s.group / 4 * LANES, bytes, s.group / 4,
                       s.x + token * s.stride + static_cast<int64_t>(g) * s.group, s.stride, total);
      for (int r = 0; r < R; ++r) {
        const __m512 ws = _mm512_loadu_ps(s.ws + static_cast<int64_t>(g) * TILE_ROWS + (row_group + r) * 16);
        for (int t = 0; t < T; ++t) {
          const __m512 scale = _mm512_mul_ps(ws, _mm512_set1_ps(s.xs[(token + t) * s.token_stride + g]));
          float* to = out + r * step + 16 * t;
          _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[r][t]), scale, _mm512_loadu_ps(to)));
        }
      }
    }
  }
};

template <typename Work, int R>
INLINE void all_tokens(const Work& work, int32_t row_group) {
  int32_t t = 0;
  for (; t + TOKENS <= work.tokens; t += TOKENS) Work::template block<R, TOKENS>(work, row_group, t);
  switch (work.tokens - t) {
    case 1: return Work::template block<R, 1>(work, row_group, t);
    case 2: return Work::template block<R, 2>(work, row_group, t);
    case 3: return Work::template block<R, 3>(work, row_group, t);
    case 4: return Work::template block<R, 4>(work, row_group, t);
    case 5: return Work::template block<R, 5>(work, row_group, t);
    default: return;
  }
}

template <typename Work>
INLINE void all(const Work& work, int32_t row_groups) {
  int32_t r = 0;
  for (; r + ROW_GROUPS <= row_groups; r += ROW_GROUPS) all_tokens<Work, ROW_GROUPS>(work, r);
  for (; r < row_groups; ++r) all_tokens<Work, 1>(work, r);
}

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums) {
  all(Sums{panel, blocks, x, stride, tokens, sums}, row_groups);
}

void grouped(const int8_t* panel, int32_t row_groups, int32_t blocks, int32_t group, int32_t groups, const int8_t* x,
             int64_t stride, int32_t tokens, const float* ws, const float* xs, const int32_t* xsum, int64_t token_stride,
             float* out) {
  all(Groups{panel, blocks, group, groups, x, stride, tokens, ws, xs, xsum, token_stride, out}, row_groups);
}

void flush(const int32_t* sums, int32_t row_groups, int32_t tokens, const float* ws, const float* xs, const int32_t* xsum,
           int64_t token_stride, int32_t flip, float* out) {
  for (int32_t g = 0; g < row_groups; ++g) {
    const __m512 scale = _mm512_loadu_ps(ws + 16 * g);
    for (int32_t t = 0; t < tokens; ++t) {
      const int64_t at = (static_cast<int64_t>(g) * tokens + t) * 16;
      const __m512i shift = _mm512_mullo_epi32(_mm512_set1_epi32(flip), _mm512_set1_epi32(xsum[t * token_stride]));
      const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums + at), shift));
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(xs[t * token_stride]));
      _mm512_storeu_ps(out + at, _mm512_fmadd_ps(value, both, _mm512_loadu_ps(out + at)));
    }
  }
}

// 16 registers of 16 double words, rows and columns exchanged.
INLINE void transpose(__m512i* v) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), high = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    a[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    a[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = a[i];
}

// 16 rows of up to 64 bytes each; rows past the end are those of the first.
INLINE void load_rows(const Weight& weight, int32_t row, int32_t rows, int64_t at, int64_t count, __m512i* v) {
  const uint8_t* base = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes + at;
  const __mmask64 some = first_bytes(count);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_epi8(some, base + (i < rows ? i : 0) * weight.row_bytes);
}

// Zero points of 16 rows for one group, as 16 x 4 equal bytes.
INLINE __m512i zeros_of(const Weight& weight, int32_t row, int32_t rows, int32_t group) {
  if (weight.zeros == nullptr) return _mm512_set1_epi8(8);
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group;
  alignas(64) uint32_t zero[16];
  for (int i = 0; i < 16; ++i) {
    const int32_t at = weight.scale_stride == 0 ? 0 : row + (i < rows ? i : 0);
    zero[i] = 0x01010101u * (static_cast<uint32_t>(weight.zeros[static_cast<int64_t>(at / 8) * groups + group]) >> 4 * (at % 8) & 15);
  }
  return _mm512_load_si512(zero);
}

// The double word of each row holds 8 codes; registers of the first and the last four, a code a byte.
INLINE __m512i spread(__m512i codes, int which) {
  // vpmultishiftqb picks for every byte the 8 bits from some bit of its quadword on.
  const int64_t first = 0x2c2824200c080400;
  const __m512i from = _mm512_set1_epi64(which == 0 ? first : first + 0x1010101010101010);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(from, codes), _mm512_set1_epi8(15));
}

// 128 columns of 16 rows of nibbles. Zero points change between groups, which are a multiple of 4 columns.
struct NibbleDecoder {
  const Weight& weight;
  int32_t row, rows;
  __m512i table, flip;
  int32_t group = -1;
  __m512i zeros;

  NibbleDecoder(const Weight& w, int32_t first_row, int32_t count, uint8_t bias) : weight(w), row(first_row), rows(count) {
    flip = _mm512_set1_epi8(static_cast<char>(bias));
    table = _mm512_setzero_si512();
    if (w.kind == Kind::codebook4) {
      const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table));
      table = _mm512_xor_si512(_mm512_broadcast_i32x4(entries), flip);
    }
  }

  INLINE __m512i values(NibbleDecoder& self, __m512i codes, int32_t column) {
    if (self.weight.kind == Kind::codebook4) return _mm512_shuffle_epi8(self.table, codes);
    const int32_t group = column / self.weight.group;
    if (group != self.group) {
      self.group = group;
      self.zeros = zeros_of(self.weight, self.row, self.rows, group);
    }
    return _mm512_xor_si512(_mm512_sub_epi8(codes, self.zeros), self.flip);
  }
};

// The part's columns are whole registers, but for the last at the end of the rows.
void decode_nibbles(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const int32_t end = (part.columns + 3) / 4;
  for (int32_t r = 0; r < part.rows; r += 16) {
    NibbleDecoder decoder(weight, part.first_row + r, least(part.rows - r, 16), flip);
    int8_t* to = panel + static_cast<int64_t>(r / 16) * part.blocks * LANES;
    // A byte holds two columns, so a part may begin in the middle of a quadword; it is read from there on.
    for (int32_t c = 0; c < part.columns; c += 128) {
      __m512i v[16];
      const int64_t bytes = (least(part.columns - c, 128) + 1) / 2;
      load_rows(weight, decoder.row, decoder.rows, (part.first_column + c) / 2, bytes, v);
      transpose(v);
      const int32_t count = least(end - c / 4, 32);
      for (int32_t b = 0; b < count; ++b) {
        const __m512i codes = spread(v[b / 2], b % 2);
        _mm512_storeu_si512(to + (c / 4 + b) * LANES, NibbleDecoder::values(decoder, codes, part.first_column + c + 4 * b));
      }
    }
  }
}

void decode_bytes(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(flip));
  const int32_t end = (part.columns + 3) / 4;
  for (int32_t r = 0; r < part.rows; r += 16) {
    int8_t* to = panel + static_cast<int64_t>(r / 16) * part.blocks * LANES;
    for (int32_t c = 0; c < part.columns; c += 64) {
      __m512i v[16];
      load_rows(weight, part.first_row + r, least(part.rows - r, 16), part.first_column + c, part.columns - c, v);
      transpose(v);
      const int32_t count = least(end - c / 4, 16);
      for (int32_t b = 0; b < count; ++b) _mm512_storeu_si512(to + (c / 4 + b) * LANES, _mm512_xor_si512(v[b], bias));
    }
  }
}

void decode_rows(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  if (weight.kind == Kind::integer8) return decode_bytes(weight, part, flip, panel);
  decode_nibbles(weight, part, flip, panel);
}

}  // namespace

const Kernels panels_avx512 = {
    "avx512",    nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
    decode_rows, nullptr, 128,     panel,   flush,   grouped, nullptr,
};

}  // namespace quern
