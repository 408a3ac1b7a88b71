#include "kernels/scalar.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/tables.h"

namespace quern {

const Kernels scalar_table = {
    "scalar",
    scalar::quantize,
    scalar::split,
    scalar::rotate,
    scalar::scales,
    0,
    scalar::panel,
    scalar::flush,
    nullptr,
    scalar::minimums,
    scalar::read,
};

namespace scalar {
namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {  // a subnormal number is a multiple of 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

// Greatest |x| as its bits: their order is that of the numbers, infinities and NaNs being above all others.
uint32_t greatest(const float* x, int32_t count) {
  uint32_t found = 0;
  for (int32_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
    found = bits > found ? bits : found;
  }
  return found;
}

void quantize_group(const float* x, int32_t count, float given, int8_t* values, float* scale, int32_t* sum) {
  const uint32_t bits = greatest(x, count);
  const float top = float_of(bits);
  *sum = 0;
  if (bits >= 0x7f800000 || (given == 0.0f && top < 0x1p-100f)) {
    *scale = bits >= 0x7f800000 ? float_of(0x7fc00000) : 0.0f;
    memset(values, 0, count);
    return;
  }
  *scale = given == 0.0f ? top / 127.0f : given;
  const float inverse = given == 0.0f ? 127.0f / top : 1.0f / given;
  for (int32_t i = 0; i < count; ++i) {
    // Ties to even, as the default rounding mode has it. Without a given scale |x| * inverse is at most a rounding error
    // above 127.
    values[i] = static_cast<int8_t>(nearbyintf(std::clamp(x[i] * inverse, -127.0f, 127.0f)));
    *sum += values[i];
  }
}

// OCP 8-bit Floating Point Specification 1.0: four bits of exponent and three of fraction, no infinities.
float from_float8_e4m3(uint8_t byte) {
  const uint32_t sign = static_cast<uint32_t>(byte & 0x80) << 24, exponent = byte >> 3 & 15, fraction = byte & 7;
  if ((byte & 0x7f) == 0x7f) return float_of(0x7fc00000);
  if (exponent == 0) {  // a subnormal number is a multiple of 2^-9
    const float magnitude = static_cast<float>(fraction) * 0x1p-9f;
    return sign ? -magnitude : magnitude;
  }
  return float_of(sign | (exponent + 120) << 23 | fraction << 20);
}

// OCP Microscaling Formats 1.0: a power of two, from 2^-127 on; the greatest byte is not a number.
float from_float8_e8m0(uint8_t byte) {
  if (byte == 0xff) return float_of(0x7fc00000);
  return float_of(byte == 0 ? 0x00400000 : static_cast<uint32_t>(byte) << 23);
}

}  // namespace

float number(const void* data, Float type, int64_t index) {
  if (type == Float::float32) {
    uint32_t bits;
    memcpy(&bits, static_cast<const char*>(data) + 4 * index, 4);
    return float_of(bits);
  }
  if (type == Float::float8_e4m3) return from_float8_e4m3(static_cast<const uint8_t*>(data)[index]);
  if (type == Float::float8_e8m0) return from_float8_e8m0(static_cast<const uint8_t*>(data)[index]);
  uint16_t half;
  memcpy(&half, static_cast<const char*>(data) + 2 * index, 2);
  return type == Float::float16 ? from_float16(half) : float_of(static_cast<uint32_t>(half) << 16);
}

void quantize(const float* x, int32_t columns, int32_t group, float given, int8_t* values, float* scale, int32_t* sums) {
  for (int32_t g = 0, c = 0; c < columns; ++g, c += group)
    quantize_group(x + c, std::min(group, columns - c), given, values + c, scale + g, sums + g);
}

void split(const int8_t* values, int64_t count, int8_t* even, int8_t* odd) {
  for (int64_t i = 0; i < count / 2; ++i) {
    even[i] = values[2 * i];
    odd[i] = values[2 * i + 1];
  }
}

void rotate(float* values, int32_t columns, int32_t block, const uint8_t* signs) {
  for (int32_t c = 0; c < columns; ++c)
    if (signs[c / 8] >> c % 8 & 1) values[c] = -values[c];
  const float norm = 1.0f / sqrtf(static_cast<float>(block));
  for (float* x = values; x < values + columns; x += block) {
    for (int32_t half = 1; half < block; half *= 2)
      for (int32_t i = 0; i < block; i += 2 * half)
        for (int32_t j = i; j < i + half; ++j) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
    for (int32_t i = 0; i < block; ++i) x[i] *= norm;
  }
}

float scale_of(const Weight& weight, int32_t row, int32_t group) {
  return number(weight.scale, weight.scale_type, row * weight.scale_stride + group) * weight.scale_factor;
}

void scales(const Weight& weight, int32_t row, int32_t first, int32_t count, float* out) {
  for (int32_t i = 0; i < count; ++i) out[i] = scale_of(weight, row, first + i);
}

uint64_t read(const void* data, int64_t bytes) {
  const unsigned char* p = static_cast<const unsigned char*>(data);
  uint64_t sum = 0, word;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    memcpy(&word, p + i, 8);
    sum += word;
  }
  for (; i < bytes; ++i) sum += p[i];
  return sum;
}

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums) {
  for (int32_t g = 0; g < row_groups; ++g)
    for (int32_t t = 0; t < tokens; ++t) {
      int32_t* out = sums + (static_cast<int64_t>(g) * tokens + t) * 16;
      for (int32_t block = 0; block < blocks; ++block) {
        const int8_t* w = panel + (static_cast<int64_t>(g) * blocks + block) * LANES;
        const int8_t* v = x + t * stride + 4 * block;
        for (int32_t lane = 0; lane < LANES; ++lane) out[lane / 4] += w[lane] * v[lane % 4];
      }
    }
}

void flush(const int32_t* sums, int32_t row_groups, int32_t tokens, const float* ws, const float* xs,
           const int32_t* xsum, int64_t token_stride, int32_t flip, float* out) {
  for (int32_t g = 0; g < row_groups; ++g)
    for (int32_t t = 0; t < tokens; ++t)
      for (int32_t r = 0; r < 16; ++r) {
        const int64_t at = (static_cast<int64_t>(g) * tokens + t) * 16 + r;
        // The sum of unsigned codes may wrap around; what remains does not.
        const uint32_t sum = static_cast<uint32_t>(sums[at]) - static_cast<uint32_t>(flip) * static_cast<uint32_t>(xsum[t * token_stride]);
        out[at] = fmaf(static_cast<float>(static_cast<int32_t>(sum)), ws[16 * g + r] * xs[t * token_stride], out[at]);
      }
}

void minimums(const float* minimums, int32_t row_groups, int32_t tokens, int32_t groups, const float* xs,
              const int32_t* xsum, float* out) {
  for (int32_t r = 0; r < 16 * row_groups; ++r)
    for (int32_t t = 0; t < tokens; ++t) {
      float low = 0.0f;
      for (int32_t g = 0; g < groups; ++g) {
        const int64_t at = static_cast<int64_t>(t) * groups + g;
        low = fmaf(minimums[static_cast<int64_t>(g) * TILE_ROWS + r], static_cast<float>(xsum[at]) * xs[at], low);
      }
      out[(static_cast<int64_t>(r / 16) * tokens + t) * 16 + r % 16] += low;
    }
}

}  // namespace scalar
}  // namespace quern
