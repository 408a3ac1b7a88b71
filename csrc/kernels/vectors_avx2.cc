// Quantizing, rotating, scales and reading; the AVX-512 file has the same in wider registers.
#include "kernels/common_avx2.h"
#include "kernels/tables.h"

namespace quern {
namespace {

INLINE void quantize_group(const float* x, int32_t count, float given, int8_t* values, float* scale, int32_t* total) {
  // The order of the bits of |x| is that of the numbers, infinities and NaNs being above all others.
  __m256i greatest = _mm256_setzero_si256();
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int32_t i = 0; i < count; i += 8)
    greatest = _mm256_max_epi32(greatest, _mm256_and_si256(_mm256_castps_si256(load_floats(x + i, count - i)), magnitude));
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), greatest);
  int32_t bits = 0;
  for (int32_t lane : lanes) bits = lane > bits ? lane : bits;
  float top;
  __builtin_memcpy(&top, &bits, sizeof top);
  *total = 0;
  if (bits >= 0x7f800000 || (given == 0.0f && top < 0x1p-100f)) {
    *scale = bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
    __builtin_memset(values, 0, static_cast<size_t>(count));
    return;
  }
  *scale = given == 0.0f ? top / 127.0f : given;
  const __m256 inverse = _mm256_set1_ps(given == 0.0f ? 127.0f / top : 1.0f / given);
  const __m256 least_value = _mm256_set1_ps(-127.0f), greatest_value = _mm256_set1_ps(127.0f);
  __m256i added = _mm256_setzero_si256();
  for (int32_t i = 0; i < count; i += 8) {
    const __m256 scaled = _mm256_mul_ps(load_floats(x + i, count - i), inverse);
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(scaled, least_value), greatest_value));
    added = _mm256_add_epi32(added, rounded);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    __builtin_memcpy(values + i, &bytes, static_cast<size_t>(least(count - i, 8)));
  }
  *total = sum(added);
}

void quantize(const float* x, int32_t columns, int32_t group, float given, int8_t* values, float* scale, int32_t* sums) {
  for (int32_t g = 0, c = 0; c < columns; ++g, c += group)
    quantize_group(x + c, least(group, columns - c), given, values + c, scale + g, sums + g);
}

void split(const int8_t* values, int64_t count, int8_t* even, int8_t* odd) {
  const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3,
                                         5, 7, 9, 11, 13, 15);
  for (int64_t i = 0; i < count; i += 64) {
    // Quadwords after the shuffle: even, odd, even, odd.
    const __m256i a = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load(values + i), order), 0xd8);
    const __m256i b = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load(values + i + 32), order), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + i / 2), _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd + i / 2), _mm256_permute2x128_si256(a, b, 0x31));
  }
}

// One stage of distance `half` (8 or more) over a block, 8 at a time.
INLINE void stage(float* x, int32_t block, int32_t half) {
  for (int32_t i = 0; i < block; i += 2 * half)
    for (int32_t j = i; j < i + half; j += 8) {
      const __m256 a = _mm256_loadu_ps(x + j), b = _mm256_loadu_ps(x + j + half);
      _mm256_storeu_ps(x + j, _mm256_add_ps(a, b));
      _mm256_storeu_ps(x + j + half, _mm256_sub_ps(a, b));
    }
}

// Stages of distance 1, 2 and 4.
INLINE __m256 within(__m256 x) {
  const auto butterfly = [](__m256 v, __m256 swapped, auto blend) { return blend(_mm256_add_ps(v, swapped), _mm256_sub_ps(swapped, v)); };
  x = butterfly(x, _mm256_permute_ps(x, 0xb1), [](__m256 a, __m256 b) { return _mm256_blend_ps(a, b, 0xaa); });
  x = butterfly(x, _mm256_permute_ps(x, 0x4e), [](__m256 a, __m256 b) { return _mm256_blend_ps(a, b, 0xcc); });
  return butterfly(x, _mm256_permute2f128_ps(x, x, 1), [](__m256 a, __m256 b) { return _mm256_blend_ps(a, b, 0xf0); });
}

void rotate(float* values, int32_t columns, int32_t block, const uint8_t* signs) {
  const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(block));
  for (int32_t c = 0; c < columns; ++c)
    if (signs[c / 8] >> c % 8 & 1) values[c] = -values[c];
  for (float* x = values; x < values + columns; x += block) {
    if (block >= 8) {
      for (int32_t i = 0; i < block; i += 8) _mm256_storeu_ps(x + i, within(_mm256_loadu_ps(x + i)));
      for (int32_t half = 8; half < block; half *= 2) stage(x, block, half);
    } else {
      for (int32_t half = 1; half < block; half *= 2)
        for (int32_t i = 0; i < block; ++i)
          if ((i & half) == 0) {
            const float a = x[i], b = x[i + half];
            x[i] = a + b;
            x[i + half] = a - b;
          }
    }
    for (int32_t i = 0; i < block; ++i) x[i] *= norm;
  }
}

void scales(const Weight& weight, int32_t row, int32_t first, int32_t count, float* out) {
  for (int32_t i = 0; i < count; ++i) out[i] = scale_of(weight, row, first + i);
}

uint64_t read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m256i total[4];
  for (__m256i& v : total) v = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 128 <= bytes; i += 128)
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(p + i + 32 * j + 4096, _MM_HINT_T0);
      total[j] = _mm256_add_epi64(total[j], load(p + i + 32 * j));
    }
  for (; i < bytes; i += 32) total[0] = _mm256_add_epi64(total[0], load_some(p + i, bytes - i));
  const __m256i all = _mm256_add_epi64(_mm256_add_epi64(total[0], total[1]), _mm256_add_epi64(total[2], total[3]));
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), all);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

}  // namespace

const Kernels vectors_avx2 = {
    "avx2", quantize, split, rotate, scales, 0, nullptr, nullptr, nullptr, nullptr, read,
};

}  // namespace quern
