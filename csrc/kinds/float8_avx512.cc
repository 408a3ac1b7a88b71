// 8-bit floating-point numbers: sixteen partial sums for each row and group; see kernels/kernels.h.
#include "kernels/common_avx512.h"
#include "kinds/float8-inl.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

// 16 or 32 numbers divided by their unit, as float16. e4m3: no NaN, which would be 480.
template <Float8 TYPE>
INLINE __m256i halves(__m128i bytes) {
  if constexpr (TYPE == Float8::e5m2) return _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  return _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
}

template <Float8 TYPE>
INLINE __m512i halves(__m256i bytes) {
  if constexpr (TYPE == Float8::e5m2) return _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 8);
  const __m512i shifted = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);
  return _mm512_and_si512(shifted, _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
}

// As in plain_avx512-inl.h: lane i + lane (i + 8), then 4, 2, 1 apart.
INLINE float sum(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

constexpr int64_t FAR = 4096;  // bytes of all rows side by side from a line to the one that is fetched

// Bytes less their sign: the greatest tells whether an e4m3 number is none.
INLINE __m512i magnitudes(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(0x7f)); }

// The columns [start, end) of ROWS rows added to their outputs.
template <Float8 TYPE, int TOKENS, int ROWS>
INLINE void add_group(const Weight& weight, const Inputs& in, int32_t row, int32_t group, int32_t start, int32_t end,
                      float (*out)[TOKENS]) {
  __m512 total[ROWS][TOKENS];
  __m512i most[ROWS];
  for (auto& line : total)
    for (__m512& v : line) v = _mm512_setzero_ps();
  for (__m512i& v : most) v = _mm512_setzero_si512();
  const uint8_t* w = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  int32_t c = start;
  for (; c + 64 <= end; c += 64) {
    // Float16s are widened as they are read: from a register that takes two more steps, on the ports that are busy.
    alignas(64) uint16_t wide[ROWS][64];
    // What is fetched behind the end of a row belongs to the rows that come next.
    const int64_t ahead = c + FAR / ROWS + (c + FAR / ROWS < weight.row_bytes ? 0 : (ROWS - 1) * weight.row_bytes);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const uint8_t* line = w + r * weight.row_bytes;
      _mm_prefetch(reinterpret_cast<const char*>(line + ahead), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(line + c + 256), _MM_HINT_T0);
      if constexpr (TYPE == Float8::e4m3) most[r] = _mm512_max_epu8(most[r], magnitudes(_mm512_loadu_si512(line + c)));
#pragma GCC unroll 2
      for (int half = 0; half < 64; half += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + c + half));
        _mm512_store_si512(&wide[r][half], halves<TYPE>(bytes));
      }
    }
    asm("" : "+m"(wide));  // or the compiler takes the registers after all
#pragma GCC unroll 4
    for (int step = 0; step < 64; step += 16) {
      __m512 x[TOKENS];
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) x[t] = _mm512_loadu_ps(in.exact + static_cast<int64_t>(t) * in.columns + c + step);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const __m512 v = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(&wide[r][step])));
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
      most[r] = _mm512_max_epu8(most[r], magnitudes(_mm512_zextsi128_si512(bytes)));
      const __m512 v = _mm512_cvtph_ps(halves<TYPE>(bytes));
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_mask3_fmadd_ps(v, x[t], total[r][t], some);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float ws = _mm512_cvtss_f32(load_scales(weight, row + r, group, 1)) * UNIT<TYPE>;
    const bool none = TYPE == Float8::e4m3 && _mm512_cmpeq_epi8_mask(most[r], _mm512_set1_epi8(0x7f)) != 0;
    if (none) ws = __builtin_nanf("");
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
