// Scales and zero points of 16 rows side by side: lanes are rows. Rows from `rows` on are those of row 0, or zero.
// No include guard and no linkage: for rows_avx512-inl.h alone.
#include "kernels/common_avx512.h"

namespace quern {
namespace {

constexpr int32_t ROWS = 16;   // side by side
constexpr int32_t BATCH = 16;  // groups whose scales are loaded together

struct ByteOrder {
  uint8_t from[64];
};

// Byte 4 * g + r is byte g of 128-bit lane r.
constexpr ByteOrder order_of_lanes() {
  ByteOrder order = {};
  for (int i = 0; i < 64; ++i) order.from[i] = static_cast<uint8_t>(i % 4 * 16 + i / 4);
  return order;
}

alignas(64) constexpr ByteOrder ORDER_OF_LANES = order_of_lanes();

// Bytes of 16 groups, from rows `stride` apart, rows and groups exchanged: lane l of register j has those of group 4 * l + j.
INLINE void load_bytes(const uint8_t* from, int64_t stride, int32_t rows, __m512i* out) {
  const __m512i order = _mm512_load_si512(&ORDER_OF_LANES);
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m128i line[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      line[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (4 * i + j < rows ? 4 * i + j : 0) * stride));
    __m512i all = _mm512_inserti32x4(_mm512_castsi128_si512(line[0]), line[1], 1);
    all = _mm512_inserti32x4(_mm512_inserti32x4(all, line[2], 2), line[3], 3);
    four[i] = _mm512_permutexvar_epi8(order, all);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]), high01 = _mm512_unpackhi_epi32(four[0], four[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(four[2], four[3]), high23 = _mm512_unpackhi_epi32(four[2], four[3]);
  out[0] = _mm512_unpacklo_epi64(low01, low23);
  out[1] = _mm512_unpackhi_epi64(low01, low23);
  out[2] = _mm512_unpacklo_epi64(high01, high23);
  out[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Scales of one byte, of 16 whole groups; false where one is not a number, which is left to the general way.
INLINE bool load_byte_scales(const Weight& weight, int32_t row, int32_t rows, int32_t group, __m512* ws) {
  const bool e4m3 = weight.scale_type == Float::float8_e4m3;
  const float factor = weight.scale_factor * (e4m3 ? 256.0f : 1.0f);
  if (!(factor <= 0x1p127f)) return false;
  __m512i bytes[4];
  load_bytes(static_cast<const uint8_t*>(weight.scale) + row * weight.scale_stride + group, weight.scale_stride, rows, bytes);
  const __m512i magnitude = _mm512_set1_epi8(e4m3 ? 0x7f : -1);
  __m512i most = _mm512_and_si512(bytes[0], magnitude);
#pragma GCC unroll 3
  for (int j = 1; j < 4; ++j) most = _mm512_max_epu8(most, _mm512_and_si512(bytes[j], magnitude));
  if (_mm512_cmpeq_epi8_mask(most, magnitude) != 0) return false;
  const __m512 factors = _mm512_set1_ps(factor);
  alignas(64) uint8_t lanes[4][4][16];
  alignas(64) uint16_t halves[4][4][16];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) _mm512_store_si512(lanes[j], bytes[j]);
  asm("" : "+m"(lanes));  // to be widened as they are read, which is one step less
  if (!e4m3) {
#pragma GCC unroll 16
    for (int i = 0; i < BATCH; ++i) {
      const __m128i lane = _mm_load_si128(reinterpret_cast<const __m128i*>(lanes[i % 4][i / 4]));
      const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(lane), 23);
      const __m512i numbers = _mm512_max_epu32(exponents, _mm512_set1_epi32(0x00400000));
      ws[i] = _mm512_mul_ps(_mm512_castsi512_ps(numbers), factors);
    }
    return true;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i two = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes[i / 2][i % 2 * 2]));
    const __m512i shifted = _mm512_slli_epi16(_mm512_cvtepi8_epi16(two), 7);
    _mm512_store_si512(halves[i / 2][i % 2 * 2], _mm512_and_si512(shifted, _mm512_set1_epi16(static_cast<int16_t>(0xbf80))));
  }
  asm("" : "+m"(halves));
#pragma GCC unroll 16
  for (int i = 0; i < BATCH; ++i) {
    const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(halves[i % 4][i / 4]));
    ws[i] = _mm512_mul_ps(_mm512_cvtph_ps(lane), factors);
  }
  return true;
}

// Scales of up to 16 groups from `group` on.
INLINE void load_scales_of_rows(const Weight& weight, int32_t row, int32_t rows, int32_t group, int32_t count, __m512* ws) {
  if (count == BATCH && bytes_of(weight.scale_type) == 1 && load_byte_scales(weight, row, rows, group, ws)) return;
  __m512i v[ROWS];
  for (int r = 0; r < rows; ++r) v[r] = _mm512_castps_si512(load_scales(weight, row + r, group, first_lanes(count)));
  for (int r = rows; r < ROWS; ++r) v[r] = _mm512_setzero_si512();
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < BATCH; ++i) ws[i] = _mm512_castsi512_ps(v[i]);
}

// Zero points of 4 bits, packed down eight rows a word.
struct Zeros {
  const int32_t* words;  // of the first row, by group; null: all are 8
  __m512i shift;         // of each row in its word
  __mmask16 second;      // rows that are in the next eight's word
};

constexpr int WORDS = 2;  // of 16 rows, which begin with a word, for each group

// `row` is a multiple of 8, as pieces of a product begin, or the only one.
INLINE Zeros zeros_of(const Weight& weight, int32_t row, int32_t rows) {
  Zeros zeros = {nullptr, _mm512_setzero_si512(), 0};
  if (weight.zeros == nullptr) return zeros;
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group;
  zeros.words = weight.zeros;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if (weight.scale_stride == 0) return zeros;
  zeros.words += static_cast<int64_t>(row / 8) * groups;
  const __m512i place = _mm512_add_epi32(lanes, _mm512_set1_epi32(row % 8));
  zeros.shift = _mm512_slli_epi32(_mm512_and_si512(place, _mm512_set1_epi32(7)), 2);
  zeros.second = _mm512_cmpge_epi32_mask(place, _mm512_set1_epi32(8)) & first_lanes(rows);
  return zeros;
}

// The words of up to 16 groups from `group` on.
INLINE void load_zeros(const Zeros& zeros, int32_t groups, int32_t group, int32_t count, int32_t (*out)[BATCH]) {
  const __mmask16 some = first_lanes(count);
  const __mmask16 next = zeros.second != 0 ? some : 0;
  _mm512_storeu_si512(out[0], _mm512_maskz_loadu_epi32(some, zeros.words + group));
  _mm512_storeu_si512(out[1], _mm512_maskz_loadu_epi32(next, zeros.words + group + groups));
}

INLINE __m512i zeros_at(const Zeros& zeros, const int32_t (*words)[BATCH], int place) {
  const __m512i all = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0][place]), zeros.second, words[1][place]);
  return _mm512_and_si512(_mm512_srlv_epi32(all, zeros.shift), _mm512_set1_epi32(15));
}

}  // namespace
}  // namespace quern
