// Products of rows and panels for codes that lie along the rows. A register of codes meets the inputs of its columns by SDOT, four
// groups at a time are scaled together; groups that do not begin at a register are left to the scalar version.
//
// No include guard and no linkage: for <kind>_neon.cc alone. Such a file says in a struct `Code` how its codes become values:
// PER_BYTE codes a byte; `add` adds the products of a register of codes and the inputs from byte `at` of a row on; `values`:
// columns in order of a register of codes; NARROW: of 4-bit codes as stored, less the zero point.
#include "kernels/common_neon.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

INLINE const uint8_t* codes_at(const Weight& weight, int32_t row) {
  return static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
}

INLINE int32_t zero_at(const Weight& weight, int32_t row, int32_t group) {
  if (weight.zeros == nullptr) return 8;
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group, at = weight.scale_stride == 0 ? 0 : row;
  return weight.zeros[static_cast<int64_t>(at / 8) * groups + group] >> 4 * (at % 8) & 15;
}

// Whether groups begin at registers of codes.
template <typename Code>
INLINE bool whole(const Weight& weight) {
  return weight.group == weight.columns || weight.group % (REGISTER * Code::PER_BYTE) == 0;
}

// Sums of the bytes [at, end) of a row; inputs behind the last column are zero.
template <typename Code>
INLINE int32x4_t add_range(const Code& code, const uint8_t* row, const Inputs& in, int32_t token, int64_t at, int64_t end) {
  int32x4_t sums[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
  for (; at + 2 * REGISTER <= end; at += 2 * REGISTER)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sums[i] = code.add(sums[i], load_bytes(row + at + REGISTER * i), in, token, at + REGISTER * i);
  for (; at + REGISTER <= end; at += REGISTER) sums[0] = code.add(sums[0], load_bytes(row + at), in, token, at);
  if (at < end) sums[0] = code.add(sums[0], load_some(row + at, end - at), in, token, at);
  return vaddq_s32(sums[0], sums[1]);
}

template <typename Code>
INLINE float multiply_row(const Weight& weight, const Inputs& in, int32_t row, int32_t token) {
  const uint8_t* bytes = codes_at(weight, row);
  const int64_t size = in.group / Code::PER_BYTE;
  const float* xs = in.scale + static_cast<int64_t>(token) * in.groups;
  const int32_t* totals = in.sums + static_cast<int64_t>(token) * in.groups;
  float out = 0.0f;
  int32_t g = 0;
  for (; g + 4 <= in.columns / in.group; g += 4) {
    int32x4_t found[4];
    for (int i = 0; i < 4; ++i) {
      const Code code(weight, row, g + i);
      found[i] = add_range(code, bytes, in, token, (g + i) * size, (g + i + 1) * size);
    }
    int32x4_t sums = sums_of(found[0], found[1], found[2], found[3]);
    if constexpr (Code::NARROW) {
      int32_t zeros[4];
      for (int i = 0; i < 4; ++i) zeros[i] = zero_at(weight, row, g + i);
      sums = vmlsq_s32(sums, vld1q_s32(zeros), vld1q_s32(totals + g));
    }
    float value[4], scale[4];
    vst1q_f32(value, vcvtq_f32_s32(sums));
    vst1q_f32(scale, vmulq_f32(four_scales(weight, row, g), vld1q_f32(xs + g)));
    for (int i = 0; i < 4; ++i) out = __builtin_fmaf(value[i], scale[i], out);
  }
  for (; g < in.groups; ++g) {
    const Code code(weight, row, g);
    const int64_t end = (least((g + 1) * in.group, in.columns) + Code::PER_BYTE - 1) / Code::PER_BYTE;
    int32_t sum = vaddvq_s32(add_range(code, bytes, in, token, g * size, end));
    if constexpr (Code::NARROW) sum -= zero_at(weight, row, g) * totals[g];
    out = __builtin_fmaf(static_cast<float>(sum), scale_of(weight, row, g) * xs[g], out);
  }
  return out;
}

template <typename Code>
void multiply(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  if (!whole<Code>(weight)) return Code::scalar().rows(weight, in, first, last, outputs);
  for (int32_t t = 0; t < in.tokens; ++t)
    for (int32_t row = first; row < last; ++row) outputs[t * in.rows + row] = multiply_row<Code>(weight, in, row, t);
}

template <typename Code>
void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  constexpr int32_t COLUMNS = REGISTER * Code::PER_BYTE;
  if (!whole<Code>(weight) || part.first_column % COLUMNS != 0 || flip != 0)
    return Code::scalar().panel(weight, part, flip, panel);
  const int32_t blocks = (part.columns + 3) / 4;
  const int64_t end = (static_cast<int64_t>(weight.columns) + Code::PER_BYTE - 1) / Code::PER_BYTE;
  for (int32_t row = 0; row < part.rows; ++row) {
    const uint8_t* bytes = codes_at(weight, part.first_row + row);
    int8_t* to = panel + row / 16 * static_cast<int64_t>(part.blocks) * LANES + row % 16 * 4;
    for (int32_t c = 0; c < part.columns; c += COLUMNS) {
      const int32_t column = part.first_column + c;
      const int64_t at = column / Code::PER_BYTE;
      const Code code(weight, part.first_row + row, column / weight.group);
      int8x16_t found[Code::PER_BYTE];
      code.values(at + REGISTER <= end ? load_bytes(bytes + at) : load_some(bytes + at, end - at), found);
      for (int i = 0; i < Code::PER_BYTE; ++i) {
        int32_t four[4];
        vst1q_s32(four, vreinterpretq_s32_s8(found[i]));
        for (int j = 0; j < 4 && c / 4 + 4 * i + j < blocks; ++j)
          __builtin_memcpy(to + static_cast<int64_t>(c / 4 + 4 * i + j) * LANES, four + j, 4);
      }
    }
  }
}

}  // namespace
}  // namespace quern
