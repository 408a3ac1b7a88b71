// Inputs for vpmaddubsw, which adds two products of unsigned weights and inputs in 16 bits; for AVX2 files, without a guard or
// linkage.
//
// Weights are made unsigned by adding a number to all of them, so that nothing has to be done to their signs, and the sum of the
// inputs times that number is taken off in the end. Where weights then reach up to 255, two inputs of one sign may be too large
// together, which is rare: such four inputs are cut into two halves, and the weights meet either.
#include "kernels/common_avx2.h"

namespace quern {
namespace {

// The greatest sum of two inputs of one sign that weights from 0 to `greatest` may meet. 254 and more: any.
INLINE int32_t most_together(int32_t greatest) { return INT16_MAX / (greatest > 1 ? greatest : 1); }

// Which of eight blocks of four inputs have two neighbours whose sum is above `most` or below -most; a bit each. Inputs of two
// signs, of which neither is above 127, always fit.
INLINE int32_t too_large(__m256i inputs, int32_t most) {
  const __m256i sums = _mm256_abs_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), inputs));
  const __m256i large = _mm256_cmpgt_epi16(sums, _mm256_set1_epi16(static_cast<int16_t>(most)));
  return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_or_si256(large, _mm256_slli_epi32(large, 16))));
}

// Half of four inputs, rounded down; the other half is what is left.
INLINE int32_t half_of(int32_t four) {
  int8_t each[4];
  __builtin_memcpy(each, &four, 4);
  for (int8_t& x : each) x = static_cast<int8_t>(x >> 1);
  __builtin_memcpy(&four, each, 4);
  return four;
}

INLINE int32_t rest_of(int32_t four, int32_t half) {
  int8_t whole[4], part[4];
  __builtin_memcpy(whole, &four, 4);
  __builtin_memcpy(part, &half, 4);
  for (int i = 0; i < 4; ++i) whole[i] = static_cast<int8_t>(whole[i] - part[i]);
  __builtin_memcpy(&four, whole, 4);
  return four;
}

// Four neighbouring products a lane, of unsigned weights and inputs that fit.
INLINE __m256i unsigned_products(__m256i weights, __m256i inputs) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(weights, inputs), _mm256_set1_epi16(1));
}

}  // namespace
}  // namespace quern
