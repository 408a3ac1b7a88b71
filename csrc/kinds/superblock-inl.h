// Where numbers lie in ggml's super-blocks of 256 weights and blocks of 32 (ggml-common.h of https://github.com/ggml-org/ggml),
// with internal linkage; see kernels/common_avx512.h. A group of GROUP columns has a whole number of a scale and, where MINIMUMS,
// one of a minimum; the float16 numbers at D_AT and MINIMUM_AT multiply them:
//     value = code(column) * scale(group) * d * UNIT - minimum(group) * d_min
// Codes of types with POINTS are sizes that a table has, of as many points as one of WIDTH columns, times signs.
#pragma once

#include <cstdint>

#include "kernels/weight.h"

namespace quern {
namespace {

constexpr int32_t SUPER = 256;  // columns of a super-block

// What most types are alike in.
struct SuperBlock {
  static constexpr int32_t COLUMNS = SUPER, POINTS = 0, WIDTH = 0;
  static constexpr float UNIT = 1.0f;
};

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

struct Q2K : SuperBlock {
  static constexpr int32_t BYTES = 84, GROUP = 16, D_AT = 80, MINIMUM_AT = 82;
  static constexpr bool MINIMUMS = true;
  static int32_t code(const uint8_t* b, int32_t c) { return bits_at(b, 16 + c / 128 * 32 + c % 32, c / 32 % 4 * 2, 3); }
  static int32_t scale(const uint8_t* b, int32_t group) { return b[group] & 15; }
  static int32_t minimum(const uint8_t* b, int32_t group) { return b[group] >> 4; }
};

struct Q3K : SuperBlock {
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

struct Q4K : SuperBlock {
  static constexpr int32_t BYTES = 144, GROUP = 32, D_AT = 0, MINIMUM_AT = 2;
  static constexpr bool MINIMUMS = true;
  static int32_t code(const uint8_t* b, int32_t c) { return bits_at(b, 16 + c / 64 * 32 + c % 32, c / 32 % 2 * 4, 15); }
  static int32_t scale(const uint8_t* b, int32_t group) { return six_bit_scale(b + 4, group); }
  static int32_t minimum(const uint8_t* b, int32_t group) { return six_bit_minimum(b + 4, group); }
};

struct Q5K : SuperBlock {
  static constexpr int32_t BYTES = 176, GROUP = 32, D_AT = 0, MINIMUM_AT = 2;
  static constexpr bool MINIMUMS = true;
  static int32_t code(const uint8_t* b, int32_t c) {
    return bits_at(b, 48 + c / 64 * 32 + c % 32, c / 32 % 2 * 4, 15) | bits_at(b, 16 + c % 32, c / 32, 1) << 4;
  }
  static int32_t scale(const uint8_t* b, int32_t group) { return six_bit_scale(b + 4, group); }
  static int32_t minimum(const uint8_t* b, int32_t group) { return six_bit_minimum(b + 4, group); }
};

struct Q6K : SuperBlock {
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

struct IQ4XS : SuperBlock {
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

// Blocks of 32 columns, one group each, whose minimum is added.
template <int32_t BITS>
struct Affine : SuperBlock {
  static constexpr int32_t COLUMNS = 32, BYTES = BITS == 4 ? 20 : 24, GROUP = 32, D_AT = 0, MINIMUM_AT = 2;
  static constexpr bool MINIMUMS = true;
  static int32_t code(const uint8_t* b, int32_t c) {
    const int32_t low = bits_at(b, BYTES - 16 + c % 16, c / 16 * 4, 15);
    return BITS == 4 ? low : low | bits_at(b, 4 + c / 8, c % 8, 1) << 4;
  }
  static int32_t scale(const uint8_t*, int32_t) { return 1; }
  static int32_t minimum(const uint8_t*, int32_t) { return -1; }
};

using Q41 = Affine<4>;
using Q51 = Affine<5>;

struct Points : SuperBlock {
  static constexpr int32_t D_AT = 0, MINIMUM_AT = 0;
  static constexpr bool MINIMUMS = false;
  static int32_t minimum(const uint8_t*, int32_t) { return 0; }
};

inline uint32_t word_at(const uint8_t* bytes, int32_t at) {
  return bytes[at] | bytes[at + 1] << 8 | bytes[at + 2] << 16 | static_cast<uint32_t>(bytes[at + 3]) << 24;
}

// Whether column `c` of eight is negative, of seven stored signs: the eighth makes the number of negative ones even.
inline bool negative_of_seven(uint32_t signs, int32_t c) {
  if (c < 7) return (signs >> c & 1) != 0;
  signs ^= signs >> 4;
  signs ^= signs >> 2;
  signs ^= signs >> 1;
  return (signs & 1) != 0;
}

inline int32_t signed_size(int32_t size, bool negative) { return negative ? -size : size; }

struct IQ2XXS : Points {
  static constexpr int32_t BYTES = 66, GROUP = 32, POINTS = 256, WIDTH = 8;
  static constexpr float UNIT = 0.125f;
  static int32_t code(const int8_t* table, const uint8_t* b, int32_t c) {
    const uint32_t signs = word_at(b, 6 + c / 32 * 8) >> c % 32 / 8 * 7 & 127;
    return signed_size(table[8 * b[2 + c / 32 * 8 + c % 32 / 8] + c % 8], negative_of_seven(signs, c % 8));
  }
  static int32_t scale(const uint8_t* b, int32_t group) { return 2 * static_cast<int32_t>(word_at(b, 6 + group * 8) >> 28) + 1; }
};

struct IQ2XS : Points {
  static constexpr int32_t BYTES = 74, GROUP = 16, POINTS = 512, WIDTH = 8;
  static constexpr float UNIT = 0.125f;
  static int32_t code(const int8_t* table, const uint8_t* b, int32_t c) {
    const int32_t code = b[2 + c / 8 * 2] | b[3 + c / 8 * 2] << 8;
    return signed_size(table[8 * (code & 511) + c % 8], negative_of_seven(static_cast<uint32_t>(code) >> 9, c % 8));
  }
  static int32_t scale(const uint8_t* b, int32_t group) { return 2 * bits_at(b, 66 + group / 2, group % 2 * 4, 15) + 1; }
};

struct IQ2S : Points {
  static constexpr int32_t BYTES = 82, GROUP = 16, POINTS = 1024, WIDTH = 8;
  static constexpr float UNIT = 0.125f;
  static int32_t code(const int8_t* table, const uint8_t* b, int32_t c) {
    const int32_t point = b[2 + c / 8] | bits_at(b, 66 + c / 32, c / 8 % 4 * 2, 3) << 8;
    return signed_size(table[8 * point + c % 8], bits_at(b, 34 + c / 8, c % 8, 1) != 0);
  }
  static int32_t scale(const uint8_t* b, int32_t group) { return 2 * bits_at(b, 74 + group / 2, group % 2 * 4, 15) + 1; }
};

struct IQ3XXS : Points {
  static constexpr int32_t BYTES = 98, GROUP = 32, POINTS = 256, WIDTH = 4;
  static constexpr float UNIT = 0.25f;
  static int32_t code(const int8_t* table, const uint8_t* b, int32_t c) {
    const uint32_t signs = word_at(b, 66 + c / 32 * 4) >> c % 32 / 8 * 7 & 127;
    return signed_size(table[4 * b[2 + c / 4] + c % 4], negative_of_seven(signs, c % 8));
  }
  static int32_t scale(const uint8_t* b, int32_t group) { return 2 * static_cast<int32_t>(word_at(b, 66 + group * 4) >> 28) + 1; }
};

struct IQ3S : Points {
  static constexpr int32_t BYTES = 110, GROUP = 32, POINTS = 512, WIDTH = 4;
  static int32_t code(const int8_t* table, const uint8_t* b, int32_t c) {
    const int32_t point = b[2 + c / 4] | bits_at(b, 66 + c / 32, c / 4 % 8, 1) << 8;
    return signed_size(table[4 * point + c % 4], bits_at(b, 74 + c / 8, c % 8, 1) != 0);
  }
  static int32_t scale(const uint8_t* b, int32_t group) { return 2 * bits_at(b, 106 + group / 2, group % 2 * 4, 15) + 1; }
};

inline const uint8_t* blocks_of(const Weight& weight, int32_t row) {
  return static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
}

}  // namespace
}  // namespace quern
