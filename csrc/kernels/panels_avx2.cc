// Panels of decoded weights; see panels_avx512.cc. A register of a panel is two here: rows 0 to 7 and 8 to 15.
#include "kernels/fitting_avx2-inl.h"
#include "kernels/tables.h"

namespace quern {
namespace {

INLINE __m256i four_inputs(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

void flush(const int32_t* sums, int32_t row_groups, int32_t tokens, const float* ws, const float* xs, const int32_t* xsum,
           int64_t token_stride, int32_t flip, float* out) {
  for (int32_t g = 0; g < row_groups; ++g)
    for (int32_t t = 0; t < tokens; ++t)
      for (int32_t r = 0; r < 16; r += 8) {
        const int64_t at = (static_cast<int64_t>(g) * tokens + t) * 16 + r;
        const __m256i shift = _mm256_mullo_epi32(_mm256_set1_epi32(flip), _mm256_set1_epi32(xsum[t * token_stride]));
        const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(load(sums + at), shift));
        const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(ws + 16 * g + r), _mm256_set1_ps(xs[t * token_stride]));
        _mm256_storeu_ps(out + at, _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(out + at)));
      }
}

// Numbers of a panel, which decide how they are multiplied: made unsigned by `bias`, two products of the greatest and an input may
// fit 16 bits, or two such sums. (Four would too at 4 bits, but then there are too few registers.)
struct Range {
  int32_t bias, greatest;
};

INLINE Range range_of(const int8_t* panel, int64_t bytes) {
  __m256i low = load(panel), high = low;  // of a whole number of registers
  for (int64_t i = 0; i < bytes; i += LANES) {
    const __m256i a = load(panel + i), b = load(panel + i + 32);
    low = _mm256_min_epi8(low, _mm256_min_epi8(a, b));
    high = _mm256_max_epi8(high, _mm256_max_epi8(a, b));
  }
  alignas(32) int8_t lows[32], highs[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lows), low);
  _mm256_store_si256(reinterpret_cast<__m256i*>(highs), high);
  int32_t smallest = 0, greatest = 0;
  for (int i = 0; i < 32; ++i) {
    smallest = lows[i] < smallest ? lows[i] : smallest;
    greatest = highs[i] > greatest ? highs[i] : greatest;
  }
  return {-smallest, greatest - smallest};
}

INLINE bool fits(const Range& range, int32_t registers) { return range.greatest * 2 * 127 * registers <= INT16_MAX; }

INLINE void add_to(int32_t* sums, __m256i more) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), _mm256_add_epi32(load(sums), more));
}

// total += sums of 16 rows and TOKENS tokens over `steps` registers, a multiple of EXACT: so many at a time are added in 16 bits;
// 0: signed values. Weights stay in registers while the tokens meet them.
template <int TOKENS, int EXACT>
INLINE void add_steps(const int8_t* w, int32_t steps, const int8_t* x, int64_t stride, __m256i bias, __m256i (*total)[2]) {
  constexpr int EACH = EXACT == 2 ? 2 : 1;
  for (int32_t b = 0; b < steps; b += EACH) {
    __m256i weights[EACH][2];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * EACH; ++i) weights[i / 2][i % 2] = _mm256_add_epi8(load(w + 64 * b + 32 * i), bias);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      __m256i inputs[EACH];
#pragma GCC unroll 2
      for (int i = 0; i < EACH; ++i) inputs[i] = four_inputs(x + t * stride + 4 * (b + i));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i more;
        if constexpr (EXACT == 0) {
          more = products(weights[0][half], inputs[0]);
        } else if constexpr (EXACT == 1) {
          more = unsigned_products(weights[0][half], inputs[0]);
        } else {
          const __m256i one = _mm256_maddubs_epi16(weights[0][half], inputs[0]);
          const __m256i other = _mm256_maddubs_epi16(weights[1][half], inputs[1]);
          more = _mm256_madd_epi16(_mm256_add_epi16(one, other), _mm256_set1_epi16(1));
        }
        total[t][half] = _mm256_add_epi32(total[t][half], more);
        asm("" : "+x"(total[t][half]));  // or sums are put off until there is no register left
      }
    }
  }
}

template <int TOKENS>
INLINE void load_sums(const int32_t* sums, __m256i (*total)[2]) {
  for (int t = 0; t < TOKENS; ++t) total[t][0] = load(sums + 16 * t), total[t][1] = load(sums + 16 * t + 8);
}

template <int TOKENS>
INLINE void store_sums(const __m256i (*total)[2], int32_t* sums) {
  for (int t = 0; t < TOKENS; ++t)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * t + 8 * half), total[t][half]);
}

constexpr int32_t SOME_TOKENS = 16, SOME_BLOCKS = 128;  // whose inputs are looked at together

// The other half of four inputs that were cut in two.
struct Cut {
  int32_t token, block, inputs;
};

// Inputs of some tokens and blocks, as weights of a range may meet them.
struct Fitted {
  alignas(32) int8_t inputs[SOME_TOKENS][4 * SOME_BLOCKS];
  int32_t sums[SOME_TOKENS];
  Cut cuts[SOME_TOKENS * SOME_BLOCKS];
  int32_t count;
};

INLINE void fit(const int8_t* x, int64_t stride, int32_t tokens, int32_t blocks, int32_t most, Fitted& found) {
  found.count = 0;
  for (int32_t t = 0; t < tokens; ++t) {
    __m256i total = _mm256_setzero_si256();
    for (int32_t b = 0; b < blocks; b += 8) {
      const int8_t* from = x + t * stride + 4 * b;
      const __m256i inputs = blocks - b >= 8 ? load(from) : load_some(from, 4 * (blocks - b));
      _mm256_store_si256(reinterpret_cast<__m256i*>(found.inputs[t] + 4 * b), inputs);
      total = _mm256_add_epi32(total, unsigned_products(_mm256_set1_epi8(1), inputs));
      for (uint32_t large = static_cast<uint32_t>(too_large(inputs, most)); large != 0; large &= large - 1) {
        const int32_t block = b + __builtin_ctz(large);
        int8_t* at = found.inputs[t] + 4 * block;
        int32_t whole;
        __builtin_memcpy(&whole, at, 4);
        const int32_t half = half_of(whole);
        __builtin_memcpy(at, &half, 4);
        found.cuts[found.count++] = {t, block, rest_of(whole, half)};
      }
    }
    found.sums[t] = sum(total);
  }
}

template <int TOKENS, int EXACT>
INLINE void add_tokens(const int8_t* w, int32_t blocks, const Fitted& in, int32_t first, int32_t bias, int32_t* sums) {
  const __m256i biases = _mm256_set1_epi8(static_cast<char>(bias));
  __m256i total[TOKENS][2];
  load_sums<TOKENS>(sums, total);
  for (int t = 0; t < TOKENS; ++t) {
    const __m256i shift = _mm256_mullo_epi32(_mm256_set1_epi32(bias), _mm256_set1_epi32(in.sums[first + t]));
    for (int half = 0; half < 2; ++half) total[t][half] = _mm256_sub_epi32(total[t][half], shift);
  }
  add_steps<TOKENS, EXACT>(w, blocks, in.inputs[first], 4 * SOME_BLOCKS, biases, total);
  store_sums<TOKENS>(total, sums);
}

// 16 rows.
template <int EXACT>
void add_fitted(const int8_t* w, int32_t blocks, const Fitted& in, int32_t tokens, int32_t bias, int32_t* sums) {
  int32_t t = 0;
  for (; t + 4 <= tokens; t += 4) add_tokens<4, EXACT>(w, blocks, in, t, bias, sums + 16 * t);
  for (; t < tokens; ++t) add_tokens<1, EXACT>(w, blocks, in, t, bias, sums + 16 * t);
  const __m256i biases = _mm256_set1_epi8(static_cast<char>(bias));
  for (int32_t i = 0; i < in.count; ++i) {
    const Cut& cut = in.cuts[i];
    for (int half = 0; half < 2; ++half) {
      const __m256i weights = _mm256_add_epi8(load(w + 64 * cut.block + 32 * half), biases);
      add_to(sums + 16 * cut.token + 8 * half, unsigned_products(weights, _mm256_set1_epi32(cut.inputs)));
    }
  }
}

template <int TOKENS>
INLINE void add_signed(const int8_t* w, int32_t blocks, const int8_t* x, int64_t stride, int32_t* sums) {
  __m256i total[TOKENS][2];
  load_sums<TOKENS>(sums, total);
  add_steps<TOKENS, 0>(w, blocks, x, stride, _mm256_setzero_si256(), total);
  store_sums<TOKENS>(total, sums);
}

constexpr int32_t FEW = 6;  // tokens for which it does not pay to look at weights and inputs first

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums) {
  for (int32_t g = 0; tokens < FEW && g < row_groups; ++g) {
    const int8_t* w = panel + static_cast<int64_t>(g) * blocks * LANES;
    int32_t* out = sums + static_cast<int64_t>(g) * tokens * 16;
    int32_t t = 0;
    for (; t + 4 <= tokens; t += 4) add_signed<4>(w, blocks, x + t * stride, stride, out + 16 * t);
    for (; t < tokens; ++t) add_signed<1>(w, blocks, x + t * stride, stride, out + 16 * t);
  }
  if (tokens < FEW) return;
  const Range range = range_of(panel, static_cast<int64_t>(row_groups) * blocks * LANES);
  const auto add = fits(range, 2) && blocks % 2 == 0 ? add_fitted<2> : add_fitted<1>;
  for (int32_t b = 0; b < blocks; b += SOME_BLOCKS)
    for (int32_t t = 0; t < tokens; t += SOME_TOKENS) {
      const int32_t count = least(blocks - b, SOME_BLOCKS), some = least(tokens - t, SOME_TOKENS);
      Fitted in;
      fit(x + t * stride + 4 * b, stride, some, count, most_together(range.greatest), in);
      for (int32_t g = 0; g < row_groups; ++g)
        add(panel + (static_cast<int64_t>(g) * blocks + b) * LANES, count, in, some, range.bias,
            sums + (static_cast<int64_t>(g) * tokens + t) * 16);
    }
}

// What `grouped` is told of its inputs.
struct Grouped {
  int32_t group, groups;
  const int8_t* x;
  int64_t stride;
  const float *ws, *xs;
  const int32_t* xsum;
  int64_t token_stride;
};

template <int TOKENS, int EXACT>
INLINE void add_groups(const int8_t* w, int32_t bias, const Grouped& in, int32_t first, const float* ws, float* out) {
  const __m256i biases = _mm256_set1_epi8(static_cast<char>(bias));
  const int8_t* x = in.x + first * in.stride;
  for (int32_t g = 0; g < in.groups; ++g) {
    const int64_t at = first * in.token_stride + g;
    __m256i total[TOKENS][2];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
      total[t][0] = total[t][1] = _mm256_mullo_epi32(_mm256_set1_epi32(-bias), _mm256_set1_epi32(in.xsum[at + t * in.token_stride]));
    add_steps<TOKENS, EXACT>(w + 16 * static_cast<int64_t>(g) * in.group, in.group / 4, x + g * in.group, in.stride, biases, total);
    const __m256 scales[2] = {_mm256_loadu_ps(ws + g * TILE_ROWS), _mm256_loadu_ps(ws + g * TILE_ROWS + 8)};
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const __m256 xs = _mm256_set1_ps(in.xs[at + t * in.token_stride]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = out + 16 * t + 8 * half;
        const __m256 value = _mm256_cvtepi32_ps(total[t][half]);
        _mm256_storeu_ps(to, _mm256_fmadd_ps(value, _mm256_mul_ps(scales[half], xs), _mm256_loadu_ps(to)));
      }
    }
  }
}

template <int EXACT>
void add_grouped(const int8_t* panel, int32_t row_groups, int32_t blocks, int32_t bias, const Grouped& in, int32_t tokens, float* out) {
  for (int32_t r = 0; r < row_groups; ++r) {
    const int8_t* w = panel + static_cast<int64_t>(r) * blocks * LANES;
    float* to = out + static_cast<int64_t>(r) * tokens * 16;
    int32_t t = 0;
    for (; t + 4 <= tokens; t += 4) add_groups<4, EXACT>(w, bias, in, t, in.ws + 16 * r, to + 16 * t);
    for (; t < tokens; ++t) add_groups<1, EXACT>(w, bias, in, t, in.ws + 16 * r, to + 16 * t);
  }
}

void grouped(const int8_t* panel, int32_t row_groups, int32_t blocks, int32_t group, int32_t groups, const int8_t* x,
             int64_t stride, int32_t tokens, const float* ws, const float* xs, const int32_t* xsum, int64_t token_stride,
             float* out) {
  const Grouped in{group, groups, x, stride, ws, xs, xsum, token_stride};
  const Range range = range_of(panel, static_cast<int64_t>(row_groups) * blocks * LANES);
  if (fits(range, 2) && group / 4 % 2 == 0) return add_grouped<2>(panel, row_groups, blocks, range.bias, in, tokens, out);
  if (fits(range, 1)) return add_grouped<1>(panel, row_groups, blocks, range.bias, in, tokens, out);
  add_grouped<0>(panel, row_groups, blocks, 0, in, tokens, out);
}

constexpr int32_t CHUNK = 64;  // groups whose sums of inputs are made numbers at once

// Of TOKENS tokens; each output is a chain of additions, which goes on in `low` from chunk to chunk of groups.
template <int TOKENS>
INLINE void add_minimums(const float* minimums, int32_t row_groups, int32_t groups, const float* xs, const int32_t* xsum,
                         float* out, int64_t row_group_size) {
  __m256 low[TILE_ROWS / 8][TOKENS];
  for (int32_t r = 0; r < 2 * row_groups; ++r)
    for (int t = 0; t < TOKENS; ++t) low[r][t] = _mm256_setzero_ps();
  for (int32_t first = 0; first < groups; first += CHUNK) {
    const int32_t count = least(groups - first, CHUNK);
    float totals[CHUNK][TOKENS];
    for (int t = 0; t < TOKENS; ++t)
      for (int32_t g = 0; g < count; ++g) {
        const int64_t at = static_cast<int64_t>(t) * groups + first + g;
        totals[g][t] = static_cast<float>(xsum[at]) * xs[at];
      }
    for (int32_t r = 0; r < 2 * row_groups; ++r) {
      __m256 mine[TOKENS];
      for (int t = 0; t < TOKENS; ++t) mine[t] = low[r][t];
      for (int32_t g = 0; g < count; ++g) {
        const __m256 minimum = _mm256_loadu_ps(minimums + static_cast<int64_t>(first + g) * TILE_ROWS + 8 * r);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) mine[t] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(totals[g][t]), mine[t]);
      }
      for (int t = 0; t < TOKENS; ++t) low[r][t] = mine[t];
    }
  }
  for (int32_t r = 0; r < 2 * row_groups; ++r)
    for (int t = 0; t < TOKENS; ++t) {
      float* to = out + r / 2 * row_group_size + 16 * t + r % 2 * 8;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), low[r][t]));
    }
}

void minimums(const float* minimums, int32_t row_groups, int32_t tokens, int32_t groups, const float* xs,
              const int32_t* xsum, float* out) {
  const int64_t stride = groups, size = static_cast<int64_t>(tokens) * 16;
  int32_t t = 0;
  for (; t + 8 <= tokens; t += 8)
    add_minimums<8>(minimums, row_groups, groups, xs + t * stride, xsum + t * stride, out + 16 * t, size);
  for (; t < tokens; ++t) add_minimums<1>(minimums, row_groups, groups, xs + t * stride, xsum + t * stride, out + 16 * t, size);
}

}  // namespace

const Kernels panels_avx2 = {
    "avx2", nullptr, nullptr, nullptr, nullptr, 0, panel, flush, grouped, minimums, nullptr,
};

}  // namespace quern
