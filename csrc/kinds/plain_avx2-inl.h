// Plain numbers: sixteen partial sums for each row; see kernels/kernels.h.
// No include guard and no linkage: for <kind>_avx2.cc alone.
#include "kernels/common_avx2.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

template <Float TYPE>
INLINE __m256 load_weights(const char* row, int32_t column, int32_t count) {
  if constexpr (TYPE == Float::float32) return load_floats(reinterpret_cast<const float*>(row) + column, count);
  alignas(16) uint16_t halves[8] = {};
  __builtin_memcpy(halves, row + 2 * static_cast<int64_t>(column), 2 * static_cast<size_t>(least(count, 8)));
  const __m128i raw = _mm_load_si128(reinterpret_cast<const __m128i*>(halves));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// Lanes 0 to 7 and 8 to 15 of the sixteen partial sums.
INLINE float sum_lanes(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <Float TYPE, int ROWS>
INLINE void plain_block(const Weight& weight, const Inputs& in, int32_t row, int32_t token, float* outputs) {
  const char* w = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
  const float* x = in.exact + static_cast<int64_t>(token) * in.columns;
  __m256 low[ROWS], high[ROWS];
  for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm256_setzero_ps();
  int32_t c = 0;
  for (; c + 16 <= in.columns; c += 16) {
    const __m256 a = _mm256_loadu_ps(x + c), b = _mm256_loadu_ps(x + c + 8);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      low[r] = _mm256_fmadd_ps(load_weights<TYPE>(w + r * weight.row_bytes, c, 8), a, low[r]);
      high[r] = _mm256_fmadd_ps(load_weights<TYPE>(w + r * weight.row_bytes, c + 8, 8), b, high[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    alignas(32) float lanes[16];
    _mm256_store_ps(lanes, low[r]);
    _mm256_store_ps(lanes + 8, high[r]);
    for (int32_t i = c; i < in.columns; ++i) {
      const char* at = w + r * weight.row_bytes;
      lanes[i - c] = __builtin_fmaf(number(at, TYPE, i), x[i], lanes[i - c]);
    }
    outputs[token * in.rows + row + r] = sum_lanes(_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8));
  }
}

template <Float TYPE>
void plain(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  int32_t row = first;
  for (; row + 4 <= last; row += 4)
    for (int32_t t = 0; t < in.tokens; ++t) plain_block<TYPE, 4>(weight, in, row, t, outputs);
  for (; row < last; ++row)
    for (int32_t t = 0; t < in.tokens; ++t) plain_block<TYPE, 1>(weight, in, row, t, outputs);
}

}  // namespace
}  // namespace quern
