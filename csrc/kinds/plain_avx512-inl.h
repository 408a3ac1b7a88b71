// Plain numbers: sixteen partial sums for each row; see kernels/kernels.h.
// No include guard and no linkage: for <kind>_avx512.cc alone.
#include "kernels/common_avx512.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

INLINE float sum(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <Float TYPE, int TOKENS, int ROWS>
INLINE void plain_rows(const Weight& weight, const Inputs& in, int32_t row, float* outputs) {
  const char* w = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
  __m512 total[ROWS][TOKENS];
  for (auto& line : total)
    for (__m512& v : line) v = _mm512_setzero_ps();
  for (int32_t c = 0; c < in.columns; c += 16) {
    const __mmask16 some = first_lanes(in.columns - c);
    __m512 x[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) x[t] = _mm512_maskz_loadu_ps(some, in.exact + static_cast<int64_t>(t) * in.columns + c);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512 v = load_numbers(w + r * weight.row_bytes, TYPE, c, some);
#pragma GCC unroll 8
      // Lanes past the end must keep what they have: 0 * x + -0 would be 0.
      for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_mask3_fmadd_ps(v, x[t], total[r][t], some);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) outputs[t * in.rows + row + r] = sum(total[r][t]);
}

template <Float TYPE, int TOKENS>
void plain_tokens(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  constexpr int ROWS = TOKENS <= 4 ? 4 : 2;
  int32_t row = first;
  for (; row + ROWS <= last; row += ROWS) plain_rows<TYPE, TOKENS, ROWS>(weight, in, row, outputs);
  for (; row < last; ++row) plain_rows<TYPE, TOKENS, 1>(weight, in, row, outputs);
}

template <Float TYPE>
void plain(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  switch (in.tokens) {
    case 1: return plain_tokens<TYPE, 1>(weight, in, first, last, outputs);
    case 2: return plain_tokens<TYPE, 2>(weight, in, first, last, outputs);
    case 3: return plain_tokens<TYPE, 3>(weight, in, first, last, outputs);
    case 4: return plain_tokens<TYPE, 4>(weight, in, first, last, outputs);
    case 5: return plain_tokens<TYPE, 5>(weight, in, first, last, outputs);
    case 6: return plain_tokens<TYPE, 6>(weight, in, first, last, outputs);
    case 7: return plain_tokens<TYPE, 7>(weight, in, first, last, outputs);
    default: return plain_tokens<TYPE, 8>(weight, in, first, last, outputs);
  }
}

}  // namespace
}  // namespace quern
