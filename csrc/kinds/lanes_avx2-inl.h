// Sums of eight rows side by side; for the AVX2 files of kinds, without linkage.
#pragma once

#include <type_traits>

#include "kernels/common_avx2.h"

namespace quern {
namespace {

constexpr int ROWS = 8;

// Eight registers of eight double words, rows and columns exchanged.
INLINE void transpose(__m256i* v) {
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

INLINE __m256i widen(__m256i v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

template <bool NARROW>
INLINE __m256i add(__m256i a, __m256i b) {
  return NARROW ? _mm256_add_epi16(a, b) : _mm256_add_epi32(a, b);
}

// Sums of eight registers, one a row, of 16 bits in the beginning, of which EXACT additions of two stay exact, or where that is
// negative of 32. GROUP 32: found[0] has those of eight rows; GROUP 16: found[0]
// of their lower halves, found[1] of the others.
template <int EXACT, int GROUP>
INLINE void add_lanes(__m256i* v, __m256i* found) {
#pragma GCC unroll 8
  for (int i = 0; EXACT == 0 && i < ROWS; ++i) v[i] = widen(v[i]);
  __m256i two[4], four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i a = v[2 * i], b = v[2 * i + 1];
    two[i] = add<(EXACT > 0)>(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    if (EXACT == 1) two[i] = widen(two[i]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i a = two[2 * i], b = two[2 * i + 1];
    four[i] = add<(EXACT > 1)>(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    if (EXACT == 2 || (EXACT > 2 && GROUP == 16)) four[i] = widen(four[i]);
  }
  const __m256i low = _mm256_permute2x128_si256(four[0], four[1], 0x20);
  const __m256i high = _mm256_permute2x128_si256(four[0], four[1], 0x31);
  found[0] = low;
  if (GROUP == 16) {
    found[1] = high;
  } else {
    found[0] = add<(EXACT > 2)>(low, high);
    if (EXACT > 2) found[0] = widen(found[0]);
  }
}

// Sums of two neighbouring double words, which are four words where NARROW, of eight registers, one a row: found[i] has the i-th
// ones of eight rows.
template <bool NARROW>
INLINE void add_pairs(__m256i* v, __m256i* found) {
  __m256i two[4], four[4];
  const auto joined = [](__m256i a, __m256i b, auto which) __attribute__((always_inline)) {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), decltype(which)::value));
  };
  constexpr std::integral_constant<int, 0x88> EVEN;
  constexpr std::integral_constant<int, 0xdd> ODD;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i a = NARROW ? widen(v[2 * i]) : v[2 * i], b = NARROW ? widen(v[2 * i + 1]) : v[2 * i + 1];
    two[i] = _mm256_add_epi32(joined(a, b, EVEN), joined(a, b, ODD));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    four[i] = joined(two[i], two[i + 1], EVEN);
    four[i + 1] = joined(two[i], two[i + 1], ODD);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    found[i] = _mm256_permute2x128_si256(four[i], four[i + 2], 0x20);
    found[i + 2] = _mm256_permute2x128_si256(four[i], four[i + 2], 0x31);
  }
}

// A byte of ones for each bit that is set.
INLINE __m256i spread_bits(uint32_t bits) {
  const __m256i order = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int32_t>(bits)), order);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
}

INLINE uint32_t word(const uint8_t* at) {
  uint32_t bits;
  __builtin_memcpy(&bits, at, 4);
  return bits;
}

}  // namespace
}  // namespace quern
