// Small helpers of the AVX2 files, with internal linkage; see common_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/isas.h"
#include "kernels/weight.h"

#define INLINE static inline __attribute__((always_inline))

namespace quern {
namespace {

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Up to 32 bytes; the others are zero.
INLINE __m256i load_some(const void* p, int64_t count) {
  alignas(32) char bytes[32] = {};
  __builtin_memcpy(bytes, p, static_cast<size_t>(count < 32 ? count : 32));
  return load(bytes);
}

// Up to 8 numbers; the others are zero.
INLINE __m256 load_floats(const float* p, int32_t count) {
  if (count >= 8) return _mm256_loadu_ps(p);
  return _mm256_castsi256_ps(load_some(p, 4 * static_cast<int64_t>(count)));
}

INLINE int32_t sum(__m256i v) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// Four neighbouring products a lane. Signed values and inputs: |value| is the unsigned operand, and the input takes over its
// sign; two products are at most 2 * 128 * 127, which 16 bits hold.
INLINE __m256i products(__m256i values, __m256i inputs) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(values), _mm256_sign_epi8(inputs, values));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// See common_avx512.h.
INLINE void fetch_ahead(const void* p) {
  const char* bytes = static_cast<const char*>(p);
  _mm_prefetch(bytes + 3584, _MM_HINT_T1);
  _mm_prefetch(bytes + 512, _MM_HINT_T0);
}

INLINE float number(const void* data, Float type, int64_t index) {
  const char* bytes = static_cast<const char*>(data);
  uint32_t bits = 0;
  float x;
  if (type == Float::float32) {
    __builtin_memcpy(&x, bytes + 4 * index, 4);
    return x;
  }
  if (type == Float::float8_e8m0) {
    const uint8_t byte = static_cast<uint8_t>(bytes[index]);
    bits = byte == 255 ? 0x7fc00000u : byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
  if (type == Float::float8_e4m3) {
    const uint32_t byte = static_cast<uint8_t>(bytes[index]);
    if ((byte & 0x7f) == 0x7f) return __builtin_nanf("");
    const uint32_t half = (byte & 0x80) << 8 | (byte & 0x7f) << 7;  // as a float16 it means so many times less
    return 256.0f * _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int32_t>(half))));
  }
  __builtin_memcpy(&bits, bytes + 2 * index, 2);
  if (type == Float::float16) return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int32_t>(bits))));
  bits <<= 16;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Of a row and group.
INLINE float scale_of(const Weight& weight, int32_t row, int32_t group) {
  return number(weight.scale, weight.scale_type, row * weight.scale_stride + group) * weight.scale_factor;
}

}  // namespace
}  // namespace quern
