// Panels of decoded weights; see panels_avx512.cc. A register of a panel is two here: rows 0 to 7 and 8 to 15.
#include "kernels/common_avx2.h"
#include "kernels/tables.h"

namespace quern {
namespace {

INLINE __m256i four_inputs(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

template <int TOKENS>
INLINE void add_panel(const int8_t* w, int32_t blocks, const int8_t* x, int64_t stride, int32_t* sums) {
  __m256i total[TOKENS][2];
  for (int t = 0; t < TOKENS; ++t)
    for (int half = 0; half < 2; ++half) total[t][half] = load(sums + 16 * t + 8 * half);
  for (int32_t b = 0; b < blocks; ++b) {
    const __m256i low = load(w + 64 * static_cast<int64_t>(b)), high = load(w + 64 * static_cast<int64_t>(b) + 32);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const __m256i inputs = four_inputs(x + t * stride + 4 * b);
      total[t][0] = _mm256_add_epi32(total[t][0], products(low, inputs));
      total[t][1] = _mm256_add_epi32(total[t][1], products(high, inputs));
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * t + 8 * half), total[t][half]);
}

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums) {
  for (int32_t g = 0; g < row_groups; ++g) {
    const int8_t* w = panel + static_cast<int64_t>(g) * blocks * LANES;
    int32_t* out = sums + static_cast<int64_t>(g) * tokens * 16;
    int32_t t = 0;
    for (; t + 4 <= tokens; t += 4) add_panel<4>(w, blocks, x + t * stride, stride, out + 16 * t);
    for (; t < tokens; ++t) add_panel<1>(w, blocks, x + t * stride, stride, out + 16 * t);
  }
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

// Eight rows of TOKENS tokens at once: each output is a chain of additions.
template <int TOKENS>
INLINE void add_minimums(const float* minimums, int32_t groups, const float* xs, const int32_t* xsum, float* out) {
  __m256 low[TOKENS];
  for (int t = 0; t < TOKENS; ++t) low[t] = _mm256_setzero_ps();
  for (int32_t g = 0; g < groups; ++g) {
    const __m256 least = _mm256_loadu_ps(minimums + static_cast<int64_t>(g) * TILE_ROWS);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t at = static_cast<int64_t>(t) * groups + g;
      low[t] = _mm256_fmadd_ps(least, _mm256_set1_ps(static_cast<float>(xsum[at]) * xs[at]), low[t]);
    }
  }
  for (int t = 0; t < TOKENS; ++t) _mm256_storeu_ps(out + 16 * t, _mm256_add_ps(_mm256_loadu_ps(out + 16 * t), low[t]));
}

void minimums(const float* minimums, int32_t row_groups, int32_t tokens, int32_t groups, const float* xs,
              const int32_t* xsum, float* out) {
  const int64_t stride = groups;
  for (int32_t r = 0; r < 16 * row_groups; r += 8) {
    float* to = out + static_cast<int64_t>(r / 16) * tokens * 16 + r % 16;
    int32_t t = 0;
    for (; t + 4 <= tokens; t += 4)
      add_minimums<4>(minimums + r, groups, xs + t * stride, xsum + t * stride, to + 16 * t);
    for (; t < tokens; ++t)
      add_minimums<1>(minimums + r, groups, xs + t * stride, xsum + t * stride, to + 16 * t);
  }
}

}  // namespace

const Kernels panels_avx2 = {
    "avx2", nullptr, nullptr, nullptr, nullptr, 0, panel, flush, nullptr, minimums, nullptr,
};

}  // namespace quern
