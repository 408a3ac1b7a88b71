// 8-bit floating-point numbers: sixteen partial sums for each row and group; see kernels/kernels.h.
#include "kernels/common_avx2.h"
#include "kinds/float8-inl.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

// Eight numbers divided by their unit. e4m3: no NaN, which would be 480; `nan` tells of them.
template <Float8 TYPE>
INLINE __m256 numbers(const uint8_t* from, int32_t* nan) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  if constexpr (TYPE == Float8::e5m2) return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 8));
  const __m128i most = _mm_set1_epi8(0x7f);
  *nan |= _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(bytes, most), most));
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7);
  return _mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16(static_cast<int16_t>(0xbf80))));
}

// As in plain_avx2-inl.h: lanes 0 to 7 and 8 to 15 of the sixteen partial sums.
INLINE float sum_lanes(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <Float8 TYPE>
void multiply(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  for (int32_t row = first; row < last; ++row) {
    const uint8_t* w = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
    for (int32_t t = 0; t < in.tokens; ++t) {
      const float* x = in.exact + static_cast<int64_t>(t) * in.columns;
      float out = 0.0f;
      for (int32_t group = 0, start = 0; start < in.columns; ++group, start += weight.group) {
        const int32_t end = least(start + weight.group, in.columns);
        __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
        int32_t nan = 0, c = start;
        for (; c + 16 <= end; c += 16) {
          low = _mm256_fmadd_ps(numbers<TYPE>(w + c, &nan), _mm256_loadu_ps(x + c), low);
          high = _mm256_fmadd_ps(numbers<TYPE>(w + c + 8, &nan), _mm256_loadu_ps(x + c + 8), high);
        }
        alignas(32) float lanes[16];
        _mm256_store_ps(lanes, low);
        _mm256_store_ps(lanes + 8, high);
        alignas(32) float rest[16];
        if (c < end) {
          alignas(16) uint8_t few[16] = {};
          __builtin_memcpy(few, w + c, static_cast<size_t>(end - c));
          _mm256_store_ps(rest, numbers<TYPE>(few, &nan));
          _mm256_store_ps(rest + 8, numbers<TYPE>(few + 8, &nan));
        }
        for (int32_t i = c; i < end; ++i) lanes[i - c] = __builtin_fmaf(rest[i - c], x[i], lanes[i - c]);
        float ws = scale_of(weight, row, group) * UNIT<TYPE>;
        if (nan != 0) ws = __builtin_nanf("");
        out = __builtin_fmaf(sum_lanes(_mm256_load_ps(lanes), _mm256_load_ps(lanes + 8)), ws, out);
      }
      outputs[t * in.rows + row] = out;
    }
  }
}

}  // namespace

const KindKernels float8_e4m3_avx2 = {multiply<Float8::e4m3>, nullptr, nullptr};
const KindKernels float8_e5m2_avx2 = {multiply<Float8::e5m2>, nullptr, nullptr};

}  // namespace quern
