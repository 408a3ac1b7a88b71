// Small helpers of the NEON files, with internal linkage; see common_avx2.h. Products are four neighbouring bytes to a lane of 32
// bits (SDOT), which adds exactly what the scalar kernels add.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

#define INLINE static inline __attribute__((always_inline))

namespace quern {
namespace {

constexpr int32_t REGISTER = 16;  // bytes

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

INLINE int8x16_t load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
INLINE uint8x16_t load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }

// Up to 16 bytes; the others are zero.
INLINE uint8x16_t load_some(const void* p, int64_t count) {
  uint8_t bytes[REGISTER] = {};
  __builtin_memcpy(bytes, p, static_cast<size_t>(count < REGISTER ? count : REGISTER));
  return vld1q_u8(bytes);
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
  uint16_t half = 0;
  if (type == Float::float8_e4m3) {
    const uint32_t byte = static_cast<uint8_t>(bytes[index]);
    if ((byte & 0x7f) == 0x7f) return __builtin_nanf("");
    half = static_cast<uint16_t>((byte & 0x80) << 8 | (byte & 0x7f) << 7);  // as a float16 it means so many times less
  } else {
    __builtin_memcpy(&half, bytes + 2 * index, 2);
  }
  if (type == Float::bfloat16) {
    bits = static_cast<uint32_t>(half) << 16;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
  const float found = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half))), 0);
  return type == Float::float8_e4m3 ? 256.0f * found : found;
}

// Of a row and group.
INLINE float scale_of(const Weight& weight, int32_t row, int32_t group) {
  return number(weight.scale, weight.scale_type, row * weight.scale_stride + group) * weight.scale_factor;
}

// Of four groups of a row.
INLINE float32x4_t four_scales(const Weight& weight, int32_t row, int32_t group) {
  const int64_t first = row * weight.scale_stride + group;
  const char* bytes = static_cast<const char*>(weight.scale);
  if (weight.scale_type == Float::float16) {
    uint16_t halves[4];
    __builtin_memcpy(halves, bytes + 2 * first, 8);
    return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves))), weight.scale_factor);
  }
  float each[4];
  for (int i = 0; i < 4; ++i) each[i] = number(bytes, weight.scale_type, first + i);
  return vmulq_n_f32(vld1q_f32(each), weight.scale_factor);
}

// The sums of the lanes of four registers, a lane each.
INLINE int32x4_t sums_of(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
  return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

}  // namespace
}  // namespace quern
