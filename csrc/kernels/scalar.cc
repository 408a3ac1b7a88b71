#include "kernels/scalar.h"

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
    scalar::integer4,
    scalar::integer8,
    scalar::codebook4,
    scalar::plain,
    scalar::trellis,
    scalar::decode_rows,
    scalar::decode_trellis,
    0,
    scalar::panel,
    scalar::flush,
    nullptr,
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

void quantize_group(const float* x, int32_t count, int8_t* values, float* scale, int32_t* sum) {
  const uint32_t bits = greatest(x, count);
  const float top = float_of(bits);
  *sum = 0;
  if (bits >= 0x7f800000 || top < 0x1p-100f) {
    *scale = bits >= 0x7f800000 ? float_of(0x7fc00000) : 0.0f;
    memset(values, 0, count);
    return;
  }
  *scale = top / 127.0f;
  const float inverse = 127.0f / top;
  for (int32_t i = 0; i < count; ++i) {
    // Ties to even, as the default rounding mode has it; |x| * inverse is at most a rounding error above 127.
    values[i] = static_cast<int8_t>(nearbyintf(x[i] * inverse));
    *sum += values[i];
  }
}

int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

// sum over groups, in order, of fma(float(sum of values * inputs), ws * xs, out).
template <typename Value>
void rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs, Value value) {
  for (int32_t row = first; row < last; ++row) {
    for (int32_t t = 0; t < in.tokens; ++t) {
      const int8_t* x = in.values + t * in.stride;
      float out = 0.0f;
      for (int32_t g = 0; g < in.groups; ++g) {
        int32_t sum = 0;
        const int32_t end = least((g + 1) * in.group, in.columns);
        for (int32_t c = g * in.group; c < end; ++c) sum += value(row, c, g) * x[c];
        float ws;
        scales(weight, row, g, 1, &ws);
        out = fmaf(static_cast<float>(sum), ws * in.scale[t * in.groups + g], out);
      }
      outputs[t * in.rows + row] = out;
    }
  }
}

int32_t nibble(const Weight& weight, int32_t row, int32_t column) {
  const uint8_t byte = static_cast<const uint8_t*>(weight.codes)[row * weight.row_bytes + column / 2];
  return column % 2 ? byte >> 4 : byte & 15;
}

int32_t zero_point(const Weight& weight, int32_t row, int32_t group) {
  if (weight.zeros == nullptr) return 8;
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group;
  const int32_t at = weight.scale_stride == 0 ? 0 : row;
  return weight.zeros[static_cast<int64_t>(at / 8) * groups + group] >> 4 * (at % 8) & 15;
}

int32_t value4(const Weight& weight, int32_t row, int32_t column, int32_t group) {
  const int32_t code = nibble(weight, row, column);
  return weight.kind == Kind::codebook4 ? weight.table[code] : code - zero_point(weight, row, group);
}

int32_t value8(const Weight& weight, int32_t row, int32_t column) {
  return static_cast<const int8_t*>(weight.codes)[row * weight.row_bytes + column];
}

// One column of one tile's 16 rows r, r + 16, ...: where its code stream lies and how long it is.
struct Stream {
  const uint8_t* bytes;  // byte j at bytes[64 * j]
  int32_t steps, bits;   // bits: of the whole bytes

  Stream(const Weight& weight, int32_t tile, int32_t block, int32_t lane) {
    const int32_t height = least(weight.rows - tile * TILE_ROWS, TILE_ROWS);
    steps = (height + 15) / 16;
    const int32_t registers = (weight.bits * steps + 7) / 8, whole = (weight.bits * 16 + 7) / 8;
    const int64_t blocks = (weight.columns + 3) / 4;
    bits = 8 * registers;
    bytes = static_cast<const uint8_t*>(weight.codes) +
            LANES * (tile * blocks * whole + static_cast<int64_t>(block) * registers) + lane;
  }

  // The `window` bits that end with step `step`'s; steps below 0 go round the end. At most 7 + 7 bits: two bytes hold them.
  int32_t index(const Weight& weight, int32_t step) const {
    const int32_t first = ((weight.bits * (step + 1) - weight.window) % bits + bits) % bits;
    const int32_t byte = first / 8, next = 8 * byte + 8 == bits ? 0 : byte + 1;
    return (bytes[LANES * byte] | bytes[LANES * next] << 8) >> first % 8 & ((1 << weight.window) - 1);
  }

  int32_t value(const Weight& weight, int32_t step) const {
    if (weight.tables == 1) return weight.table[index(weight, step - weight.lag)];
    return weight.table[index(weight, step)] + weight.table[(1 << weight.window) + index(weight, step - weight.lag)];
  }
};

}  // namespace

float number(const void* data, Float type, int64_t index) {
  if (type == Float::float32) {
    uint32_t bits;
    memcpy(&bits, static_cast<const char*>(data) + 4 * index, 4);
    return float_of(bits);
  }
  uint16_t half;
  memcpy(&half, static_cast<const char*>(data) + 2 * index, 2);
  return type == Float::float16 ? from_float16(half) : float_of(static_cast<uint32_t>(half) << 16);
}

void quantize(const float* x, int32_t columns, int32_t group, int8_t* values, float* scale, int32_t* sums) {
  for (int32_t g = 0, c = 0; c < columns; ++g, c += group)
    quantize_group(x + c, least(group, columns - c), values + c, scale + g, sums + g);
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

void scales(const Weight& weight, int32_t row, int32_t first, int32_t count, float* out) {
  for (int32_t i = 0; i < count; ++i) out[i] = number(weight.scale, weight.scale_type, row * weight.scale_stride + first + i);
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

void integer4(const Weight& weight, const Inputs& inputs, int32_t first, int32_t last, float* outputs) {
  rows(weight, inputs, first, last, outputs,
       [&](int32_t row, int32_t column, int32_t group) { return value4(weight, row, column, group); });
}

void integer8(const Weight& weight, const Inputs& inputs, int32_t first, int32_t last, float* outputs) {
  rows(weight, inputs, first, last, outputs, [&](int32_t row, int32_t column, int32_t) { return value8(weight, row, column); });
}

void codebook4(const Weight& weight, const Inputs& inputs, int32_t first, int32_t last, float* outputs) {
  integer4(weight, inputs, first, last, outputs);
}

void plain(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  const Float type = weight.kind == Kind::bfloat16 ? Float::bfloat16 : Float::float32;
  for (int32_t row = first; row < last; ++row) {
    const char* w = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
    for (int32_t t = 0; t < in.tokens; ++t) {
      const float* x = in.exact + static_cast<int64_t>(t) * in.columns;
      float lanes[16] = {};
      for (int32_t c = 0; c < in.columns; ++c) lanes[c % 16] = fmaf(number(w, type, c), x[c], lanes[c % 16]);
      for (int32_t width = 8; width > 0; width /= 2)
        for (int32_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
      outputs[t * in.rows + row] = lanes[0];
    }
  }
}

void trellis(const Weight& weight, int32_t tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  const int32_t steps = Stream(weight, tile, 0, 0).steps;
  memset(sums, 0, sizeof(int32_t) * 16 * steps);
  for (int32_t block = first; block < last; ++block) {
    for (int32_t lane = 0; lane < LANES; ++lane) {
      const Stream stream(weight, tile, block, lane);
      for (int32_t step = 0; step < steps; ++step)
        sums[16 * step + lane / 4] += stream.value(weight, step) * x[4 * block + lane % 4];
    }
  }
}

void decode_rows(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  for (int32_t row = 0; row < part.rows; ++row)
    for (int32_t c = 0; c < part.columns; ++c) {
      const int32_t r = part.first_row + row, column = part.first_column + c;
      const int32_t value =
          weight.kind == Kind::integer8 ? value8(weight, r, column) : value4(weight, r, column, column / weight.group);
      panel[(row / 16 * static_cast<int64_t>(part.blocks) + c / 4) * LANES + row % 16 * 4 + c % 4] =
          static_cast<int8_t>(value ^ flip);
    }
}

void decode_trellis(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const int32_t tile = part.first_row / TILE_ROWS, first = part.first_column / 4;
  for (int32_t block = 0; block < (part.columns + 3) / 4; ++block)
    for (int32_t lane = 0; lane < LANES; ++lane) {
      const Stream stream(weight, tile, first + block, lane);
      for (int32_t step = 0; step < stream.steps; ++step)
        panel[(step * static_cast<int64_t>(part.blocks) + block) * LANES + lane] =
            static_cast<int8_t>(stream.value(weight, step) ^ flip);
    }
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

}  // namespace scalar
}  // namespace quern
