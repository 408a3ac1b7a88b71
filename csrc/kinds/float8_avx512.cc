// 8-bit floating-point numbers: sixteen partial sums for each row and group; see kernels/kernels.h.
#include "kernels/common_avx512.h"
#include "kinds/float8-inl.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

// 16 numbers divided by their unit. e4m3: no NaN, which would be 480.
template <Float8 TYPE>
INLINE __m512 numbers(__m128i bytes) {
  if constexpr (TYPE == Float8::e5m2) return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
}

// As in plain_avx512-inl.h: lane i + lane (i + 8), then 4, 2, 1 apart.
INLINE float sum(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Which of 64 numbers are none.
template <Float8 TYPE>
INLINE __mmask64 nans(__m512i bytes) {
  if constexpr (TYPE == Float8::e5m2) return 0;
  const __m512i most = _mm512_set1_epi8(0x7f);
  return _mm512_cmpeq_epi8_mask(_mm512_and_si512(bytes, most), most);
}

// The columns [start, end) of ROWS rows added to their outputs.
template <Float8 TYPE, int TOKENS, int ROWS>
INLINE void add_group(const Weight& weight, const Inputs& in, int32_t row, int32_t group, int32_t start, int32_t end,
                      float (*out)[TOKENS]) {
  __m512 total[ROWS][TOKENS];
  __mmask64 nan[ROWS] = {};
  for (auto& line : total)
    for (__m512& v : line) v = _mm512_setzero_ps();
  const uint8_t* w = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  int32_t c = start;
  for (; c + 64 <= end; c += 64) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const uint8_t* from = w + r * weight.row_bytes + c;
      fetch_ahead<4096>(from);
      nan[r] |= nans<TYPE>(_mm512_loadu_si512(from));
    }
#pragma GCC unroll 4
    for (int step = 0; step < 64; step += 16) {
      __m512 x[TOKENS];
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) x[t] = _mm512_loadu_ps(in.exact + static_cast<int64_t>(t) * in.columns + c + step);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + r * weight.row_bytes + c + step));
        const __m512 v = numbers<TYPE>(bytes);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_fmadd_ps(v, x[t], total[r][t]);
      }
    }
  }
  for (; c < end; c += 16) {
    const __mmask16 some = first_lanes(end - c);
    __m512 x[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) x[t] = _mm512_maskz_loadu_ps(some, in.exact + static_cast<int64_t>(t) * in.columns + c);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m128i bytes = _mm_maskz_loadu_epi8(some, w + r * weight.row_bytes + c);
      nan[r] |= nans<TYPE>(_mm512_castsi128_si512(bytes)) & some;
      const __m512 v = numbers<TYPE>(bytes);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_mask3_fmadd_ps(v, x[t], total[r][t], some);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float ws = _mm512_cvtss_f32(load_scales(weight, row + r, group, 1)) * UNIT<TYPE>;
    if (nan[r] != 0) ws = __builtin_nanf("");
    for (int t = 0; t < TOKENS; ++t) out[r][t] = __builtin_fmaf(sum(total[r][t]), ws, out[r][t]);
  }
}

template <Float8 TYPE, int TOKENS, int ROWS>
INLINE void multiply_rows(const Weight& weight, const Inputs& in, int32_t row, float* outputs) {
  float out[ROWS][TOKENS] = {};
  for (int32_t group = 0, start = 0; start < in.columns; ++group, start += weight.group)
    add_group<TYPE, TOKENS, ROWS>(weight, in, row, group, start, least(start + weight.group, in.columns), out);
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) outputs[t * in.rows + row + r] = out[r][t];
}

template <Float8 TYPE, int TOKENS>
void multiply_tokens(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  constexpr int ROWS = TOKENS <= 4 ? 4 : 2;
  int32_t row = first;
  for (; row + ROWS <= last; row += ROWS) multiply_rows<TYPE, TOKENS, ROWS>(weight, in, row, outputs);
  for (; row < last; ++row) multiply_rows<TYPE, TOKENS, 1>(weight, in, row, outputs);
}

template <Float8 TYPE>
void multiply(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  switch (in.tokens) {
    case 1: return multiply_tokens<TYPE, 1>(weight, in, first, last, outputs);
    case 2: return multiply_tokens<TYPE, 2>(weight, in, first, last, outputs);
    case 3: return multiply_tokens<TYPE, 3>(weight, in, first, last, outputs);
    case 4: return multiply_tokens<TYPE, 4>(weight, in, first, last, outputs);
    case 5: return multiply_tokens<TYPE, 5>(weight, in, first, last, outputs);
    case 6: return multiply_tokens<TYPE, 6>(weight, in, first, last, outputs);
    case 7: return multiply_tokens<TYPE, 7>(weight, in, first, last, outputs);
    default: return multiply_tokens<TYPE, 8>(weight, in, first, last, outputs);
  }
}

}  // namespace

const KindKernels float8_e4m3_avx512 = {multiply<Float8::e4m3>, nullptr, nullptr};
const KindKernels float8_e5m2_avx512 = {multiply<Float8::e5m2>, nullptr, nullptr};

}  // namespace quern
