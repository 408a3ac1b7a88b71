// Small helpers of the AVX-512 files. Everything has internal linkage: an inline function that is shared between files of
// different instruction sets might be linked in the wrong version.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/weight.h"

// GCC's own headers leave the operand undefined that an unmasked instruction ignores.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#define INLINE static inline __attribute__((always_inline))

namespace quern {
namespace {

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

INLINE __mmask16 first_lanes(int32_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

INLINE __m512 from_bfloat16(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Each number divided by 256: with its bits where those of a float16 lie, it means so much less. NaN would be 480.
INLINE __m512 from_float8_e4m3(__m128i bytes) {
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_and_si128(bytes, _mm_set1_epi8(0x7f)), _mm_set1_epi8(0x7f));
  const __m512 numbers = _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
  return _mm512_mask_mov_ps(numbers, nan, _mm512_set1_ps(__builtin_nanf("")));
}

INLINE __m512 from_float8_e8m0(__m128i bytes) {
  const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
  const __m512i numbers = _mm512_max_epu32(exponents, _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(-1));
  return _mm512_mask_mov_ps(_mm512_castsi512_ps(numbers), nan, _mm512_set1_ps(__builtin_nanf("")));
}

// Lanes of up to 16 numbers from index `at` on; the others are zero.
INLINE __m512 load_numbers(const void* data, Float type, int64_t at, __mmask16 some) {
  const char* bytes = static_cast<const char*>(data);
  if (type == Float::float32) return _mm512_maskz_loadu_ps(some, bytes + 4 * at);
  if (type == Float::float8_e4m3 || type == Float::float8_e8m0) {
    const __m128i eighths = _mm_maskz_loadu_epi8(some, bytes + at);
    if (type == Float::float8_e8m0) return from_float8_e8m0(eighths);
    return _mm512_mul_ps(from_float8_e4m3(eighths), _mm512_set1_ps(256.0f));
  }
  const __m256i halves = _mm256_maskz_loadu_epi16(some, bytes + 2 * at);
  return type == Float::float16 ? _mm512_cvtph_ps(halves) : from_bfloat16(halves);
}

// Scales of up to 16 groups of a row from `group` on.
INLINE __m512 load_scales(const Weight& weight, int32_t row, int32_t group, __mmask16 some) {
  const __m512 numbers = load_numbers(weight.scale, weight.scale_type, row * weight.scale_stride + group, some);
  return _mm512_mul_ps(numbers, _mm512_set1_ps(weight.scale_factor));
}

// A register of weights. The compiler would rather read memory once for each use than hold a register, and the ports that
// read are those that prefetch; so it is not told that this is memory.
INLINE __m512i load_once(const void* p) {
  __m512i bytes = _mm512_loadu_si512(p);
  asm("" : "+v"(bytes));
  return bytes;
}

// Weights come from memory once. Few lines can be on their way to the L1 cache at a time, and one from memory holds its place
// for long; so a line is first fetched into the L2 cache, which has room for many, and from there shortly before its use.
// Code that does much with a line keeps fewer of them on their way and has to look further ahead. Measured on a Xeon with
// AMX, fraction of the speed of reading, one thread: 2-bit trellis .84 with FAR at 2048, .88 at 3072, .85 at 3584; 4-bit
// rows .84 at 2048, .90 at 4096, .78 at 6144.
template <int FAR = 3072>
INLINE void fetch_ahead(const void* p) {
  const char* bytes = static_cast<const char*>(p);
  _mm_prefetch(bytes + FAR, _MM_HINT_T1);
  _mm_prefetch(bytes + 512, _MM_HINT_T0);
}

// 16 registers of 16 double words, rows and columns exchanged.
INLINE void transpose(__m512i* v) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), high = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    a[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    a[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = a[i];
}

}  // namespace
}  // namespace quern
