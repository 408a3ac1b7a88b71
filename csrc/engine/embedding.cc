#include "engine/embedding.h"

#include <cstring>

namespace quern {
namespace {

float bfloat16_value(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float float16_value(uint16_t x) {
  uint32_t bits = (x & 0x7fffu) << 13;
  float value;
  memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;  // moves the exponent; exact, subnormal numbers included
  return (x & 0x8000u) != 0 ? -value : value;
}

float scale_at(const Weight& weight, int64_t index) {
  if (weight.scale_type == Float::float32) return static_cast<const float*>(weight.scale)[index];
  const uint16_t x = static_cast<const uint16_t*>(weight.scale)[index];
  return weight.scale_type == Float::bfloat16 ? bfloat16_value(x) : float16_value(x);
}

int32_t trellis_value(const Weight& weight, int32_t row, int32_t column) {
  const int32_t tile = row / 256, in_tile = row % 256;
  const int32_t height = weight.rows - tile * 256 < 256 ? weight.rows - tile * 256 : 256;
  const auto registers = [&](int32_t rows) { return (weight.bits * ((rows + 15) / 16) + 7) / 8; };
  const int64_t blocks = (weight.columns + 3) / 4;
  const int32_t bytes = registers(height);
  const uint8_t* block = static_cast<const uint8_t*>(weight.codes) + tile * blocks * registers(256) * 64 +
                         static_cast<int64_t>(column / 4) * bytes * 64;
  const int32_t lane = (in_tile % 16) * 4 + column % 4, stream = 8 * bytes;
  const auto window = [&](int32_t step) {
    uint32_t found = 0;
    for (int32_t i = 0; i < weight.window; ++i) {
      const int32_t bit = ((weight.bits * (step + 1) - weight.window + i) % stream + stream) % stream;
      found |= static_cast<uint32_t>((block[(bit / 8) * 64 + lane] >> (bit % 8)) & 1) << i;
    }
    return found;
  };
  const int32_t step = in_tile / 16;
  int32_t value = weight.table[window(step)];
  if (weight.tables == 2) value += weight.table[(1 << weight.window) + window(step - weight.lag)];
  return value;
}

}  // namespace

void decode_row(const Weight& weight, int32_t row, float* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
  if (weight.kind == Kind::float32) {
    memcpy(out, codes, sizeof(float) * weight.columns);
    return;
  }
  if (weight.kind == Kind::bfloat16) {
    for (int32_t c = 0; c < weight.columns; ++c)
      out[c] = bfloat16_value(reinterpret_cast<const uint16_t*>(codes)[c]);
    return;
  }
  if (weight.kind == Kind::trellis) {
    const float scale = scale_at(weight, row * weight.scale_stride);
    for (int32_t c = 0; c < weight.columns; ++c) out[c] = static_cast<float>(trellis_value(weight, row, c)) * scale;
    return;
  }
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group;
  for (int32_t g = 0; g < groups; ++g) {
    const float scale = scale_at(weight, row * weight.scale_stride + g);
    const int32_t stop = (g + 1) * weight.group < weight.columns ? (g + 1) * weight.group : weight.columns;
    const int32_t zero_row = weight.scale_stride == 0 ? 0 : row;
    const int32_t zero =
        weight.zeros == nullptr
            ? 8
            : (static_cast<uint32_t>(weight.zeros[static_cast<int64_t>(zero_row / 8) * groups + g]) >> (4 * (zero_row % 8))) & 15;
    for (int32_t c = g * weight.group; c < stop; ++c) {
      int32_t value;
      if (weight.kind == Kind::integer8) {
        value = reinterpret_cast<const int8_t*>(codes)[c];
      } else {
        const int32_t code = (codes[c / 2] >> (4 * (c % 2))) & 15;
        value = weight.kind == Kind::codebook4 ? weight.table[code] : code - zero;
      }
      out[c] = static_cast<float>(value) * scale;
    }
  }
}

}  // namespace quern
