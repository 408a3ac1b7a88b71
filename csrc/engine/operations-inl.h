// The functions of `Operations`, written once over sixteen lanes (lanes-inl.h) and compiled for each instruction set.
// No include guard and no linkage: for operations_<instruction set>.cc alone.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine/operations.h"
#if defined(__F16C__)
#include <immintrin.h>
// GCC's own headers leave the operand undefined that an unmasked instruction ignores.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#elif defined(__ARM_FEATURE_DOTPROD)  // which operations_neon.cc is compiled for
#include <arm_neon.h>
#endif

namespace quern {
namespace {

#define QUERN_INLINE static inline __attribute__((always_inline))

#include "engine/lanes-inl.h"

// e^x to about two units in the last place (Cephes' polynomial); 0 far below, e^88 above.
QUERN_INLINE Lanes exponential(Lanes x) {
  const Lanes top = spread(88.0f), bottom = spread(-87.0f), given = x;
  x = choose(x > top, top, x);
  x = choose(x < bottom, bottom, x);
  const Lanes magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Lanes shifted = x * 1.44269504088896341f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p = lanes_of(bits_of(p) + (bits_of(shifted) << 23));
  return choose(given < bottom, Lanes{}, p);
}

void rms_norm(const float* x, const float* weight, int32_t count, float epsilon, float* out) {
  Lanes squares{};
  int32_t i = 0;
  for (; i + LANES <= count; i += LANES) squares += load(x + i) * load(x + i);
  if (i < count) squares += load_some(x + i, count - i) * load_some(x + i, count - i);
  const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + epsilon);
  for (i = 0; i + LANES <= count; i += LANES) store(out + i, load(x + i) * factor * load(weight + i));
  for (; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

QUERN_INLINE Lanes silu(Lanes x) { return x / (exponential(-x) + 1.0f); }

// (1 + tanh(y)) / 2 is the logistic function of 2 y; here y = sqrt(2 / pi) (x + 0.044715 x^3).
QUERN_INLINE Lanes gelu_tanh(Lanes x) {
  const Lanes inner = (x + 0.044715f * (x * x * x)) * 1.5957691216057308f;
  return x / (exponential(-inner) + 1.0f);
}

// erf by Abramowitz and Stegun 1964, eq. 7.1.26, which is off by 1.5e-7 at most; the tail is taken from the side of its sign.
QUERN_INLINE Lanes gelu(Lanes x) {
  const Lanes size = choose(x < 0.0f, -x, x) * 0.70710678118654752f;
  const Lanes t = 1.0f / (size * 0.3275911f + 1.0f);
  Lanes p = spread(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Lanes tail = p * t * exponential(-size * size) * 0.5f;
  return x * choose(x < 0.0f, tail, 1.0f - tail);
}

template <Lanes (*ACTIVATION)(Lanes)>
void gated_product(float* gate, const float* up, int32_t count) {
  int32_t i = 0;
  for (; i + LANES <= count; i += LANES) store(gate + i, ACTIVATION(load(gate + i)) * load(up + i));
  if (i == count) return;
  store_some(gate + i, ACTIVATION(load_some(gate + i, count - i)) * load_some(up + i, count - i), count - i);
}

template <Lanes (*ACTIVATION)(Lanes)>
void activated(float* x, int32_t count) {
  int32_t i = 0;
  for (; i + LANES <= count; i += LANES) store(x + i, ACTIVATION(load(x + i)));
  if (i == count) return;
  store_some(x + i, ACTIVATION(load_some(x + i, count - i)), count - i);
}

void add(float* x, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(x + i, load(x + i) + load(y + i));
  for (; i < count; ++i) x[i] += y[i];
}

void add_scaled(float* x, const float* y, float factor, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(x + i, load(x + i) + load(y + i) * factor);
  if (i == count) return;
  const int32_t rest = static_cast<int32_t>(count - i);
  store_some(x + i, load_some(x + i, rest) + load_some(y + i, rest) * factor, rest);
}

float exponentials(float* x, float maximum, int32_t count) {
  Lanes total{};
  int32_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Lanes e = exponential(load(x + i) - maximum);
    store(x + i, e);
    total += e;
  }
  float sum_of = sum(total);
  if (i == count) return sum_of;
  store_some(x + i, exponential(load_some(x + i, count - i) - maximum), count - i);
  for (; i < count; ++i) sum_of += x[i];
  return sum_of;
}

#if defined(__F16C__)
QUERN_INLINE Lanes half_lanes(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
#endif
}
QUERN_INLINE float half_value(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
QUERN_INLINE uint16_t half_of(float x) {
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
QUERN_INLINE Lanes half_lanes(const uint16_t* p) {
  const auto four = [&](int i) __attribute__((always_inline)) -> Floats { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + i))); };
  return {{four(0), four(4)}, {four(8), four(12)}};
}
QUERN_INLINE float half_value(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0); }
QUERN_INLINE uint16_t half_of(float x) { return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0); }
#else
QUERN_INLINE float half_value(uint16_t h) {
  // The exponent is moved by a multiplication, which is exact and gets subnormal numbers right.
  uint32_t bits = (h & 0x7fffu) << 13;
  float x;
  memcpy(&x, &bits, sizeof x);
  x *= 0x1p112f;
  memcpy(&bits, &x, sizeof bits);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(h & 0x8000u) << 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}
QUERN_INLINE uint16_t half_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    float y;
    memcpy(&y, &bits, sizeof y);
    y += 0.5f;
    memcpy(&bits, &y, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | (bits >> 13));
}
QUERN_INLINE Lanes half_lanes(const uint16_t* p) {
  float lane[LANES];
  for (int32_t i = 0; i < LANES; ++i) lane[i] = half_value(p[i]);
  return load(lane);
}
#endif

#if defined(__AVX512F__)
QUERN_INLINE Lanes byte_lanes(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// The low and the high halves of 16 bytes, which hold numbers from -8 to 7 plus 8.
QUERN_INLINE void nibble_lanes(const uint8_t* p, Lanes& low, Lanes& high) {
  const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  low = _mm512_permutexvar_ps(bytes, numbers);  // reads the lowest four bits of an index
  high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), numbers);
}
#elif defined(__AVX2__)
// Sixteen bytes as the highest ones of two registers' double words (`SHIFT` 3) or the lowest ones (0): faster than widening.
template <int SHIFT>
QUERN_INLINE void spread_bytes(const void* p, __m256i& low, __m256i& high) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  const char none = -1;
  const auto order = [&](char a, char b, char c, char d) __attribute__((always_inline)) {
    return SHIFT == 3 ? _mm_setr_epi8(none, none, none, a, none, none, none, b, none, none, none, c, none, none, none, d)
                      : _mm_setr_epi8(a, none, none, none, b, none, none, none, c, none, none, none, d, none, none, none);
  };
  low = _mm256_shuffle_epi8(bytes, _mm256_set_m128i(order(4, 5, 6, 7), order(0, 1, 2, 3)));
  high = _mm256_shuffle_epi8(bytes, _mm256_set_m128i(order(12, 13, 14, 15), order(8, 9, 10, 11)));
}

QUERN_INLINE Lanes byte_lanes(const int8_t* p) {
  __m256i low, high;
  spread_bytes<3>(p, low, high);
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(low, 24)), _mm256_cvtepi32_ps(_mm256_srai_epi32(high, 24))};
}

QUERN_INLINE void nibble_lanes(const uint8_t* p, Lanes& low, Lanes& high) {
  __m256i a, b;
  spread_bytes<0>(p, a, b);
  const __m256i mask = _mm256_set1_epi32(15), zero = _mm256_set1_epi32(8);
  const auto number = [&](__m256i codes) __attribute__((always_inline)) { return _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, zero)); };
  low = {number(_mm256_and_si256(a, mask)), number(_mm256_and_si256(b, mask))};
  high = {number(_mm256_srli_epi32(a, 4)), number(_mm256_srli_epi32(b, 4))};
}
#elif defined(__ARM_FEATURE_DOTPROD)
QUERN_INLINE Lanes byte_lanes(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  const auto number = [](int16x4_t four) __attribute__((always_inline)) -> Floats { return vcvtq_f32_s32(vmovl_s16(four)); };
  return {{number(vget_low_s16(low)), number(vget_high_s16(low))}, {number(vget_low_s16(high)), number(vget_high_s16(high))}};
}

QUERN_INLINE void nibble_lanes(const uint8_t* p, Lanes& low, Lanes& high) {
  const uint8x16_t bytes = vld1q_u8(p);
  int8_t numbers[16];
  vst1q_s8(numbers, vreinterpretq_s8_u8(vsubq_u8(vandq_u8(bytes, vdupq_n_u8(15)), vdupq_n_u8(8))));
  low = byte_lanes(numbers);
  vst1q_s8(numbers, vreinterpretq_s8_u8(vsubq_u8(vshrq_n_u8(bytes, 4), vdupq_n_u8(8))));
  high = byte_lanes(numbers);
}
#else
QUERN_INLINE Lanes byte_lanes(const int8_t* p) {
  float lane[LANES];
  for (int32_t i = 0; i < LANES; ++i) lane[i] = static_cast<float>(p[i]);
  return load(lane);
}

QUERN_INLINE void nibble_lanes(const uint8_t* p, Lanes& low, Lanes& high) {
  float lane[2][LANES];
  for (int32_t i = 0; i < LANES; ++i) lane[0][i] = static_cast<float>((p[i] & 15) - 8);
  for (int32_t i = 0; i < LANES; ++i) lane[1][i] = static_cast<float>((p[i] >> 4) - 8);
  low = load(lane[0]);
  high = load(lane[1]);
}
#endif

void to_float16(const float* x, uint16_t* out, int32_t count) {
  for (int32_t i = 0; i < count; ++i) out[i] = half_of(x[i]);
}

void from_float16(const uint16_t* x, float* out, int32_t count) {
  for (int32_t i = 0; i < count; ++i) out[i] = half_value(x[i]);
}

#include "engine/attention-inl.h"

constexpr Operations TABLE = {
    rms_norm,
    {gated_product<silu>, gated_product<gelu>, gated_product<gelu_tanh>},
    {activated<silu>, activated<gelu>, activated<gelu_tanh>},
    add,
    add_scaled,
    exponentials,
    attend,
    to_float16,
    from_float16,
};

}  // namespace
}  // namespace quern
