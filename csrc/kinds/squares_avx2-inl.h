// Products of eight rows and a token at a time for codes that lie along the rows, in groups of 8 or 16 bytes: lanes are rows, so
// the sums of a group are added to eight outputs at once (.75 of the speed of reading instead of .59 for nibbles in groups of 16
// bytes; larger groups are slower so, as eight rows are read at once). For rows_avx2-inl.h, without a guard or linkage.
#include "kernels/common_avx2.h"
#include "kinds/kinds.h"
#include "kinds/lanes_avx2-inl.h"

namespace quern {
namespace {

constexpr int32_t BATCH = 8;  // groups that are added together

// Bytes of eight float8_e4m3 numbers. As float16 numbers they mean 256 times less.
INLINE __m256 e4m3_numbers(__m128i bytes) {
  const __m128i wide = _mm_cvtepu8_epi16(bytes), magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7c00));
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

// Of eight float8_e8m0 numbers, powers of two: see `number`.
INLINE __m256 e8m0_numbers(__m128i bytes) {
  const __m256i wide = _mm256_cvtepu8_epi32(bytes);
  const __m256i least = _mm256_and_si256(_mm256_cmpeq_epi32(wide, _mm256_setzero_si256()), _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255)), _mm256_set1_epi32(0x00400000));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(wide, 23), _mm256_or_si256(least, nan)));
}

INLINE __m256 byte_numbers(Float type, __m128i bytes) {
  return type == Float::float8_e4m3 ? e4m3_numbers(bytes) : e8m0_numbers(bytes);
}

// Scales of eight groups of eight rows, of one byte each: lanes of ws[i] are the rows' of group + i.
INLINE void load_byte_scales(const Weight& weight, int32_t row, int32_t group, __m256* ws) {
  __m128i v[ROWS], a[4], b[4];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
    v[r] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const char*>(weight.scale) +
                                                            (row + r) * weight.scale_stride + group));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) a[i] = _mm_unpacklo_epi8(v[i], v[i + 4]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 2]);
    b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 2]);
  }
  const __m256 factor = _mm256_set1_ps(weight.scale_factor);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i four = i % 2 == 0 ? _mm_unpacklo_epi8(b[i / 2], b[i / 2 + 2]) : _mm_unpackhi_epi8(b[i / 2], b[i / 2 + 2]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m128i bytes = j == 0 ? four : _mm_unpackhi_epi64(four, four);
      ws[2 * i + j] = _mm256_mul_ps(byte_numbers(weight.scale_type, bytes), factor);
    }
  }
}

// The same of two bytes each.
INLINE void load_scales(const Weight& weight, int32_t row, int32_t group, __m256* ws) {
  __m128i v[ROWS], a[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
    v[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(weight.scale) +
                                                            2 * ((row + r) * weight.scale_stride + group)));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]);
    a[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    v[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  const __m256 factor = _mm256_set1_ps(weight.scale_factor);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i both[2] = {_mm_unpacklo_epi16(v[i], v[i + 4]), _mm_unpackhi_epi16(v[i], v[i + 4])};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256 numbers = weight.scale_type == Float::float16
                                 ? _mm256_cvtph_ps(both[j])
                                 : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(both[j]), 16));
      ws[2 * i + j] = _mm256_mul_ps(numbers, factor);
    }
  }
}

// The zero points of eight rows.
INLINE __m256i zeros_of(const Weight& weight, const Inputs& in, int32_t row, int32_t group) {
  if (weight.zeros == nullptr) return _mm256_set1_epi32(8);
  const __m256i word = _mm256_set1_epi32(weight.zeros[static_cast<int64_t>(row / 8) * in.groups + group]);
  return _mm256_and_si256(_mm256_srlv_epi32(word, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)), _mm256_set1_epi32(15));
}

// Outputs of eight rows and one token += eight groups of BYTES bytes, whose scales are `ws`.
template <typename Code, int BYTES>
INLINE __m256 add_square(const Code* codes, const Weight& weight, const Inputs& in, int32_t row, int32_t group, const __m256* ws, __m256 out) {
  constexpr int EACH = 32 / BYTES;
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
#pragma GCC unroll 1
  for (int g = 0; g < BATCH; g += EACH) {
    const int64_t at = static_cast<int64_t>(group + g) * BYTES;
    __m256i v[ROWS], found[EACH];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      v[r] = _mm256_setzero_si256();
      Code::template add<1>(codes[r], load(bytes + r * weight.row_bytes + at), in, at, v + r, 0);
    }
    if constexpr (EACH == 2) {
      add_lanes<(Code::NARROW ? 3 : -1), 16>(v, found);  // 4 * 2 * 2 * 15 * 127 = 30480
    } else {
      add_pairs<Code::NARROW>(v, found);
    }
#pragma GCC unroll 4
    for (int i = 0; i < EACH; ++i) {
      const int32_t which = group + g + i;
      if constexpr (Code::NARROW)
        found[i] = _mm256_sub_epi32(found[i], _mm256_mullo_epi32(zeros_of(weight, in, row, which), _mm256_set1_epi32(in.sums[which])));
      out = _mm256_fmadd_ps(_mm256_cvtepi32_ps(found[i]), _mm256_mul_ps(ws[g + i], _mm256_set1_ps(in.scale[which])), out);
    }
  }
  return out;
}

// One token and eight rows, as far as there are eight groups at a time: returns how many groups there were.
template <typename Code, int BYTES>
INLINE int32_t add_squares(const Weight& weight, const Inputs& in, int32_t row, float (*outputs)[1]) {
  Code codes[ROWS];
  for (int r = 0; r < ROWS; ++r) codes[r] = Code::make(weight, row + r);
  const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  const bool together = ROWS * weight.row_bytes <= 40 << 10;  // see eight_rows_avx2-inl.h
  const int64_t scale_bytes = bytes_of(weight.scale_type);
  __m256 out = _mm256_setzero_ps();
  int32_t g = 0;
  for (; g + BATCH <= in.columns / in.group; g += BATCH) {
    const int64_t at = BYTES * static_cast<int64_t>(g), size = BYTES * BATCH;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      for (int64_t i = 0; i < size; i += 64) {
        const uint8_t* next = together ? bytes + ROWS * (weight.row_bytes + at) + r * size : bytes + r * weight.row_bytes + at + 1536;
        _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T1);
      }
    const char* scales = static_cast<const char*>(weight.scale) + scale_bytes * (ROWS * g + (row + ROWS) * weight.scale_stride);
    for (int i = 0; i < scale_bytes * BATCH * ROWS; i += 64) _mm_prefetch(scales + i, _MM_HINT_T0);
    __m256 ws[BATCH];
    scale_bytes == 1 ? load_byte_scales(weight, row, g, ws) : load_scales(weight, row, g, ws);
    out = add_square<Code, BYTES>(codes, weight, in, row, g, ws, out);
  }
  _mm256_storeu_ps(outputs[0], out);
  return g;
}

}  // namespace
}  // namespace quern
