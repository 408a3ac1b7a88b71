// Panels of decoded weights times many tokens, without matrix tiles: vpdpbusd multiplies a register of 16 rows x 4 columns
// by four inputs of one token. Weights are the unsigned operand, shifted by 128. A block of 4 x 6 accumulators needs ten
// loads for 24 products.
#include "kernels/common_avx512.h"
#include "kernels/tables.h"

namespace quern {
namespace {

constexpr int ROW_GROUPS = 4, TOKENS = 6;  // of a block of accumulators

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

// 16 rows of TOKENS tokens at once: each output is a chain of additions.
template <int TOKENS>
INLINE void add_minimums(const float* minimums, int32_t groups, const float* xs, const int32_t* xsum, float* out) {
  __m512 low[TOKENS];
  for (int t = 0; t < TOKENS; ++t) low[t] = _mm512_setzero_ps();
  for (int32_t g = 0; g < groups; ++g) {
    const __m512 least = _mm512_loadu_ps(minimums + static_cast<int64_t>(g) * TILE_ROWS);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t at = static_cast<int64_t>(t) * groups + g;
      low[t] = _mm512_fmadd_ps(least, _mm512_set1_ps(static_cast<float>(xsum[at]) * xs[at]), low[t]);
    }
  }
  for (int t = 0; t < TOKENS; ++t) _mm512_storeu_ps(out + 16 * t, _mm512_add_ps(_mm512_loadu_ps(out + 16 * t), low[t]));
}

void minimums(const float* minimums, int32_t row_groups, int32_t tokens, int32_t groups, const float* xs,
              const int32_t* xsum, float* out) {
  const int64_t stride = groups;
  for (int32_t r = 0; r < row_groups; ++r) {
    float* to = out + static_cast<int64_t>(r) * tokens * 16;
    int32_t t = 0;
    for (; t + 8 <= tokens; t += 8)
      add_minimums<8>(minimums + 16 * r, groups, xs + t * stride, xsum + t * stride, to + 16 * t);
    for (; t < tokens; ++t)
      add_minimums<1>(minimums + 16 * r, groups, xs + t * stride, xsum + t * stride, to + 16 * t);
  }
}

}  // namespace

const Kernels panels_avx512 = {
    "avx512", nullptr, nullptr, nullptr, nullptr, 128, panel, flush, grouped, minimums, nullptr,
};

}  // namespace quern
