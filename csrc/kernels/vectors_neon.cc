// Quantizing, splitting, rotating, scales and reading.
#include "kernels/common_neon.h"
#include "kernels/tables.h"

namespace quern {
namespace {

INLINE float32x4_t load_floats(const float* p, int32_t count) {
  if (count >= 4) return vld1q_f32(p);
  float four[4] = {};
  __builtin_memcpy(four, p, sizeof(float) * static_cast<size_t>(count));
  return vld1q_f32(four);
}

INLINE void quantize_group(const float* x, int32_t count, float given, int8_t* values, float* scale, int32_t* total) {
  // The order of the bits of |x| is that of the numbers, infinities and NaNs being above all others.
  uint32x4_t greatest = vdupq_n_u32(0);
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
  for (int32_t i = 0; i < count; i += 4)
    greatest = vmaxq_u32(greatest, vandq_u32(vreinterpretq_u32_f32(load_floats(x + i, count - i)), magnitude));
  const uint32_t bits = vmaxvq_u32(greatest);
  float top;
  __builtin_memcpy(&top, &bits, sizeof top);
  *total = 0;
  if (bits >= 0x7f800000 || (given == 0.0f && top < 0x1p-100f)) {
    *scale = bits >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
    __builtin_memset(values, 0, static_cast<size_t>(count));
    return;
  }
  *scale = given == 0.0f ? top / 127.0f : given;
  const float inverse = given == 0.0f ? 127.0f / top : 1.0f / given;
  const float32x4_t lowest = vdupq_n_f32(-127.0f), highest = vdupq_n_f32(127.0f);
  int32x4_t added = vdupq_n_s32(0);
  for (int32_t i = 0; i < count; i += 4) {
    const float32x4_t scaled = vmulq_n_f32(load_floats(x + i, count - i), inverse);
    const int32x4_t rounded = vcvtnq_s32_f32(vminq_f32(vmaxq_f32(scaled, lowest), highest));
    added = vaddq_s32(added, rounded);
    const int16x4_t words = vmovn_s32(rounded);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    int8_t eight[8];
    vst1_s8(eight, bytes);
    __builtin_memcpy(values + i, eight, static_cast<size_t>(least(count - i, 4)));
  }
  *total = vaddvq_s32(added);
}

void quantize(const float* x, int32_t columns, int32_t group, float given, int8_t* values, float* scale, int32_t* sums) {
  for (int32_t g = 0, c = 0; c < columns; ++g, c += group)
    quantize_group(x + c, least(group, columns - c), given, values + c, scale + g, sums + g);
}

void split(const int8_t* values, int64_t count, int8_t* even, int8_t* odd) {
  for (int64_t i = 0; i < count; i += 32) {
    const int8x16x2_t both = vld2q_s8(values + i);
    vst1q_s8(even + i / 2, both.val[0]);
    vst1q_s8(odd + i / 2, both.val[1]);
  }
}

void rotate(float* values, int32_t columns, int32_t block, const uint8_t* signs) {
  const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(block));
  for (int32_t c = 0; c < columns; ++c)
    if (signs[c / 8] >> c % 8 & 1) values[c] = -values[c];
  for (float* x = values; x < values + columns; x += block) {
    for (int32_t half = 1; half < block; half *= 2)
      for (int32_t i = 0; i < block; i += 2 * half) {
        int32_t j = i;
        for (; j + 4 <= i + half; j += 4) {
          const float32x4_t a = vld1q_f32(x + j), b = vld1q_f32(x + j + half);
          vst1q_f32(x + j, vaddq_f32(a, b));
          vst1q_f32(x + j + half, vsubq_f32(a, b));
        }
        for (; j < i + half; ++j) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
      }
    for (int32_t i = 0; i < block; ++i) x[i] *= norm;
  }
}

void scales(const Weight& weight, int32_t row, int32_t first, int32_t count, float* out) {
  int32_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(out + i, four_scales(weight, row, first + i));
  for (; i < count; ++i) out[i] = scale_of(weight, row, first + i);
}

}  // namespace

const Kernels vectors_neon = {
    "neon", quantize, split, rotate, scales, 0, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace quern
