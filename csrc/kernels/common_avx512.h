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

// Lanes of up to 16 numbers from index `at` on; the others are zero.
INLINE __m512 load_numbers(const void* data, Float type, int64_t at, __mmask16 some) {
  const char* bytes = static_cast<const char*>(data);
  if (type == Float::float32) return _mm512_maskz_loadu_ps(some, bytes + 4 * at);
  const __m256i halves = _mm256_maskz_loadu_epi16(some, bytes + 2 * at);
  return type == Float::float16 ? _mm512_cvtph_ps(halves) : from_bfloat16(halves);
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

}  // namespace
}  // namespace quern
