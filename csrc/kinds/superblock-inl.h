// Where numbers lie in ggml's super-blocks of 256 weights (ggml-common.h of https://github.com/ggml-org/ggml), with internal
// linkage; see kernels/common_avx512.h. A group of GROUP columns has a whole number of a scale and, where MINIMUMS, one of a
// minimum; the float16 numbers at D_AT and MINIMUM_AT multiply them:
//     value = code(column) * scale(group) * d - minimum(group) * d_min
#pragma once

#include <cstdint>

#include "kernels/weight.h"

namespace quern {
namespace {

constexpr int32_t SUPER = 256;  // columns of a super-block

inline int32_t bits_at(const uint8_t* bytes, int32_t at, int32_t shift, int32_t mask) { return bytes[at] >> shift & mask; }

// Eight scales and minimums of six bits in the twelve bytes `at`.
inline int32_t six_bit_scale(const uint8_t* at, int32_t group) {
  if (group < 4) return at[group] & 63;
  return (at[group + 4] & 15) | at[group - 4] >> 6 << 4;
}

inline int32_t six_bit_minimum(const uint8_t* at, int32_t group) {
  if (group < 4) return at[group + 4] & 63;
  return at[group + 4] >> 4 | at[group] >> 6 << 4;
}

struct Q2K {
  static constexpr int32_t BYTES = 84, GROUP = 16, D_AT = 80, MINIMUM_AT = 82;
  static constexpr bool MINIMUMS = true;
  static int32_t code(const uint8_t* b, int32_t c) { return bits_at(b, 16 + c / 128 * 32 + c % 32, c / 32 % 4 * 2, 3); }
  static int32_t scale(const uint8_t* b, int32_t group) { return b[group] & 15; }
  static int32_t minimum(const uint8_t* b, int32_t group) { return b[group] >> 4; }
};

struct Q3K {
  static constexpr int32_t BYTES = 110, GROUP = 16, D_AT = 108, MINIMUM_AT = 0;
  static constexpr bool MINIMUMS = false;
  static int32_t code(const uint8_t* b, int32_t c) {
    const int32_t low = bits_at(b, 32 + c / 128 * 32 + c % 32, c / 32 % 4 * 2, 3);
    return (low | bits_at(b, c % 32, c / 32, 1) << 2) - 4;
  }
  static int32_t scale(const uint8_t* b, int32_t group) {
    const int32_t low = bits_at(b, 96 + group % 8, group / 8 * 4, 15);
    return (low | bits_at(b, 104 + group % 4, group / 4 * 2, 3) << 4) - 32;
  }
  static int32_t minimum(const uint8_t*, int32_t) { return 0; }
};

struct Q4K {
  static constexpr int32_t BYTES = 144, GROUP = 32, D_AT = 0, MINIMUM_AT = 2;
  static constexpr bool MINIMUMS = true;
  static int32_t code(const uint8_t* b, int32_t c) { return bits_at(b, 16 + c / 64 * 32 + c % 32, c / 32 % 2 * 4, 15); }
  static int32_t scale(const uint8_t* b, int32_t group) { return six_bit_scale(b + 4, group); }
  static int32_t minimum(const uint8_t* b, int32_t group) { return six_bit_minimum(b + 4, group); }
};

struct Q5K {
  static constexpr int32_t BYTES = 176, GROUP = 32, D_AT = 0, MINIMUM_AT = 2;
  static constexpr bool MINIMUMS = true;
  static int32_t code(const uint8_t* b, int32_t c) {
    return bits_at(b, 48 + c / 64 * 32 + c % 32, c / 32 % 2 * 4, 15) | bits_at(b, 16 + c % 32, c / 32, 1) << 4;
  }
  static int32_t scale(const uint8_t* b, int32_t group) { return six_bit_scale(b + 4, group); }
  static int32_t minimum(const uint8_t* b, int32_t group) { return six_bit_minimum(b + 4, group); }
};

struct Q6K {
  static constexpr int32_t BYTES = 210, GROUP = 16, D_AT = 208, MINIMUM_AT = 0;
  static constexpr bool MINIMUMS = false;
  static int32_t code(const uint8_t* b, int32_t c) {
    const int32_t low = bits_at(b, c / 128 * 64 + c % 64, c / 64 % 2 * 4, 15);
    return (low | bits_at(b, 128 + c / 128 * 32 + c % 32, c / 32 % 4 * 2, 3) << 4) - 32;
  }
  static int32_t scale(const uint8_t* b, int32_t group) { return static_cast<int8_t>(b[192 + group]); }
  static int32_t minimum(const uint8_t*, int32_t) { return 0; }
};

constexpr int8_t IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IQ4XS {
  static constexpr int32_t BYTES = 136, GROUP = 32, D_AT = 0, MINIMUM_AT = 0;
  static constexpr bool MINIMUMS = false;
  static int32_t code(const uint8_t* b, int32_t c) {
    return IQ4_LEVELS[bits_at(b, 8 + c / 32 * 16 + c % 16, c / 16 % 2 * 4, 15)];
  }
  static int32_t scale(const uint8_t* b, int32_t group) {
    return (bits_at(b, 4 + group / 2, group % 2 * 4, 15) | bits_at(b, 2 + group / 4, group % 4 * 2, 3) << 4) - 32;
  }
  static int32_t minimum(const uint8_t*, int32_t) { return 0; }
};

inline const uint8_t* blocks_of(const Weight& weight, int32_t row) {
  return static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
}

}  // namespace
}  // namespace quern
