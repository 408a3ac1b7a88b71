// ggml's super-blocks: 32 values a register, whose products are added by groups; the scales of a super-block meet the sums
// of its groups side by side, and are added in order.
#include "kinds/rows_avx2-inl.h"
#include "kinds/superblock-inl.h"

namespace quern {
namespace {

constexpr int REGISTERS = SUPER / 32;

// Fields of `mask` from bit `shift` of every byte on.
INLINE __m256i fields(const uint8_t* at, int shift, int mask) {
  return _mm256_and_si256(_mm256_srli_epi16(load(at), shift), _mm256_set1_epi8(static_cast<char>(mask)));
}

// `worth` where bit `bit` of a byte is set.
INLINE __m256i bit_worth(const uint8_t* at, int bit, int worth) {
  const __m256i which = _mm256_set1_epi8(static_cast<char>(1 << bit));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(load(at), which), which);
  return _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(worth)));
}

// The int8 values of columns 32 * i ... of a super-block.
INLINE __m256i values(Q2K, const uint8_t* b, int i) { return fields(b + 16 + i / 4 * 32, i % 4 * 2, 3); }

INLINE __m256i values(Q3K, const uint8_t* b, int i) {
  const __m256i codes = _mm256_or_si256(fields(b + 32 + i / 4 * 32, i % 4 * 2, 3), bit_worth(b, i, 4));
  return _mm256_sub_epi8(codes, _mm256_set1_epi8(4));
}

INLINE __m256i values(Q4K, const uint8_t* b, int i) { return fields(b + 16 + i / 2 * 32, i % 2 * 4, 15); }

INLINE __m256i values(Q5K, const uint8_t* b, int i) {
  return _mm256_or_si256(fields(b + 48 + i / 2 * 32, i % 2 * 4, 15), bit_worth(b + 16, i, 16));
}

INLINE __m256i values(Q6K, const uint8_t* b, int i) {
  const __m256i high = _mm256_slli_epi16(fields(b + 128 + i / 4 * 32, i % 4 * 2, 3), 4);
  const __m256i codes = _mm256_or_si256(fields(b + i / 4 * 64 + i % 2 * 32, i / 2 % 2 * 4, 15), high);
  return _mm256_sub_epi8(codes, _mm256_set1_epi8(32));
}

INLINE __m256i values(IQ4XS, const uint8_t* b, int i) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 8 + 16 * i));
  const __m256i both = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
  const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(IQ4_LEVELS));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), _mm256_and_si256(both, _mm256_set1_epi8(15)));
}

// Sums of 8 groups of the registers from `v` on: of 8 registers, or of 4.
template <int GROUP>
INLINE __m256i add_groups(const __m256i* v) {
  const __m256i a = add_four<false>(v[0], v[1], v[2], v[3]);
  if constexpr (GROUP == 16) return _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i b = add_four<false>(v[4], v[5], v[6], v[7]);
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// out = fma(first, second, out) for eight groups in order.
INLINE float add_in_order(__m256 first, __m256 second, float out) {
  alignas(32) float a[BATCH], b[BATCH];
  _mm256_store_ps(a, first);
  _mm256_store_ps(b, second);
#pragma GCC unroll 8
  for (int i = 0; i < BATCH; ++i) out = __builtin_fmaf(a[i], b[i], out);
  return out;
}

// Scales or minimums of eight groups: whole numbers times `d`.
INLINE void store_times(__m256i whole, float d, float* out) {
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(d)));
}

INLINE __m128i eight(uint64_t bytes) { return _mm_cvtsi64_si128(static_cast<int64_t>(bytes)); }

INLINE uint64_t load_bytes(const uint8_t* at, size_t count) {
  uint64_t bytes = 0;
  __builtin_memcpy(&bytes, at, count);
  return bytes;
}

// 16 unsigned bytes.
INLINE void store_sixteen(__m128i bytes, float d, float* out) {
  store_times(_mm256_cvtepu8_epi32(bytes), d, out);
  store_times(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), d, out + 8);
}

// 16 signed bytes.
INLINE void store_signed(__m128i bytes, float d, float* out) {
  store_times(_mm256_cvtepi8_epi32(bytes), d, out);
  store_times(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)), d, out + 8);
}

INLINE void six_bit_numbers(const uint8_t* b, float d, float least, float* scales, float* minimums) {
  const uint64_t first = load_bytes(b + 4, 4), second = load_bytes(b + 8, 4), third = load_bytes(b + 12, 4);
  const uint64_t upper_scales = (third & 0x0f0f0f0f) | (first >> 2 & 0x30303030);
  const uint64_t upper_minimums = (third >> 4 & 0x0f0f0f0f) | (second >> 2 & 0x30303030);
  store_times(_mm256_cvtepu8_epi32(eight((first & 0x3f3f3f3f) | upper_scales << 32)), d, scales);
  store_times(_mm256_cvtepu8_epi32(eight((second & 0x3f3f3f3f) | upper_minimums << 32)), least, minimums);
}

// Scales of a super-block, and minimums where it has any.
INLINE void numbers(Q2K, const uint8_t* b, float d, float least, float* scales, float* minimums) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), mask = _mm_set1_epi8(15);
  store_sixteen(_mm_and_si128(bytes, mask), d, scales);
  store_sixteen(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), least, minimums);
}

INLINE void numbers(Q3K, const uint8_t* b, float d, float, float* scales, float*) {
  const uint64_t low = load_bytes(b + 96, 8), high = load_bytes(b + 104, 4), both = high | high >> 2 << 32;
  const uint64_t nibbles = 0x0f0f0f0f0f0f0f0f, pairs = 0x0303030303030303;
  const uint64_t first = (low & nibbles) | (both & pairs) << 4, second = (low >> 4 & nibbles) | (both >> 4 & pairs) << 4;
  const __m128i all = _mm_unpacklo_epi64(eight(first), eight(second));
  store_signed(_mm_sub_epi8(all, _mm_set1_epi8(32)), d, scales);
}

INLINE void numbers(Q4K, const uint8_t* b, float d, float least, float* scales, float* minimums) {
  six_bit_numbers(b, d, least, scales, minimums);
}

INLINE void numbers(Q5K, const uint8_t* b, float d, float least, float* scales, float* minimums) {
  six_bit_numbers(b, d, least, scales, minimums);
}

INLINE void numbers(Q6K, const uint8_t* b, float d, float, float* scales, float*) {
  store_signed(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 192)), d, scales);
}

INLINE void numbers(IQ4XS, const uint8_t* b, float d, float, float* scales, float*) {
  const __m256i low = _mm256_set1_epi32(static_cast<int32_t>(load_bytes(b + 4, 4)));
  const __m256i high = _mm256_set1_epi32(static_cast<int32_t>(load_bytes(b + 2, 2)));
  const __m256i place = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i nibbles = _mm256_and_si256(_mm256_srlv_epi32(low, _mm256_slli_epi32(place, 1)), _mm256_set1_epi32(15));
  const __m256i pairs = _mm256_and_si256(_mm256_srlv_epi32(high, place), _mm256_set1_epi32(3));
  const __m256i all = _mm256_or_si256(nibbles, _mm256_slli_epi32(pairs, 4));
  store_times(_mm256_sub_epi32(all, _mm256_set1_epi32(32)), d, scales);
}

constexpr int32_t TOGETHER = 4;  // rows whose chains of additions wait for each other's steps

// outputs of a row += one super-block.
template <typename Type, int TOKENS>
INLINE void add_block(const uint8_t* block, const Inputs& in, int32_t column, float* out, float* low) {
  constexpr int GROUPS = SUPER / Type::GROUP, EACH = REGISTERS * BATCH / GROUPS;  // registers of a batch of groups
  for (int i = 0; i < Type::BYTES; i += 64) fetch_ahead(block + i);
  float scales[GROUPS], minimums[GROUPS];
  const float least = Type::MINIMUMS ? -number(block + Type::MINIMUM_AT, Float::float16, 0) : 0.0f;
  numbers(Type{}, block, number(block + Type::D_AT, Float::float16, 0), least, scales, minimums);
  __m256i v[REGISTERS];
#pragma GCC unroll 8
  for (int i = 0; i < REGISTERS; ++i) v[i] = values(Type{}, block, i);
  for (int t = 0; t < TOKENS; ++t) {
    const int8_t* x = in.values + t * in.stride + column;
    const int64_t at = static_cast<int64_t>(t) * in.groups + column / Type::GROUP;
    __m256i sums[REGISTERS];
#pragma GCC unroll 8
    for (int i = 0; i < REGISTERS; ++i) sums[i] = products(v[i], load(x + 32 * i));
#pragma GCC unroll 2
    for (int g = 0; g < GROUPS; g += BATCH) {
      const __m256 found = _mm256_cvtepi32_ps(add_groups<Type::GROUP>(sums + g / BATCH * EACH));
      const __m256 xs = _mm256_loadu_ps(in.scale + at + g);
      out[t] = add_in_order(found, _mm256_mul_ps(_mm256_loadu_ps(scales + g), xs), out[t]);
      if (!Type::MINIMUMS) continue;
      const __m256 total = _mm256_mul_ps(_mm256_cvtepi32_ps(load(in.sums + at + g)), xs);
      low[t] = add_in_order(_mm256_loadu_ps(minimums + g), total, low[t]);
    }
  }
}

template <typename Type, int TOKENS>
void multiply_rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  for (int32_t row = first; row < last; row += TOGETHER) {
    const int32_t rows = least(last - row, TOGETHER);
    float out[TOGETHER][TOKENS] = {}, low[TOGETHER][TOKENS] = {};
    int64_t block = 0;
    for (int32_t column = 0; column < in.columns; column += SUPER, block += Type::BYTES)
      for (int32_t r = 0; r < rows; ++r)
        add_block<Type, TOKENS>(blocks_of(weight, row + r) + block, in, column, out[r], low[r]);
    for (int32_t r = 0; r < rows; ++r)
      for (int t = 0; t < TOKENS; ++t) outputs[t * in.rows + row + r] = Type::MINIMUMS ? out[r][t] + low[r][t] : out[r][t];
  }
}

template <typename Type>
void rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  Inputs part = in;
  for (int32_t t = 0; t < in.tokens; t += part.tokens) {
    part.tokens = in.tokens - t >= 4 ? 4 : 1;
    part.values = in.values + t * in.stride;
    part.scale = in.scale + static_cast<int64_t>(t) * in.groups;
    part.sums = in.sums + static_cast<int64_t>(t) * in.groups;
    if (part.tokens == 4) multiply_rows<Type, 4>(weight, part, first, last, outputs + t * in.rows);
    if (part.tokens == 1) multiply_rows<Type, 1>(weight, part, first, last, outputs + t * in.rows);
  }
}

}  // namespace

const KindKernels q2_k_avx2 = {rows<Q2K>, nullptr, nullptr};
const KindKernels q3_k_avx2 = {rows<Q3K>, nullptr, nullptr};
const KindKernels q4_k_avx2 = {rows<Q4K>, nullptr, nullptr};
const KindKernels q5_k_avx2 = {rows<Q5K>, nullptr, nullptr};
const KindKernels q6_k_avx2 = {rows<Q6K>, nullptr, nullptr};
const KindKernels iq4_xs_avx2 = {rows<IQ4XS>, nullptr, nullptr};

}  // namespace quern
