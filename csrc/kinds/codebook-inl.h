// What all files of codes with tables share, with internal linkage; see kernels/common_avx512.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/weight.h"

namespace quern {
namespace {

constexpr int32_t PLANE_COLUMNS = 256;  // whose third bits lie together

// Planes of two or four bits: codes a byte has.
template <int BITS>
constexpr int32_t CODES = BITS == 4 ? 2 : 4;

inline const int8_t* table_of(const Weight& weight, int32_t row, int32_t group) {
  return weight.table + row * weight.table_row + group * weight.table_group;
}

inline const uint8_t* codes_of(const Weight& weight, int32_t row) {
  return static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
}

// Bytes of a row's lower two bits, after which the third ones lie.
inline int64_t low_bytes(int32_t columns) { return (static_cast<int64_t>(columns) + 15) / 16 * 4; }

// Third bits of the plane of columns `plane`, `plane` + 4 ... of the 256 that byte `at` of the lower bits belongs to, from that
// byte's on, which is a multiple of 8. At least those of 64 bytes of lower bits, as far as the row has them; whatever more.
inline uint64_t third_bits(const uint8_t* row, int32_t columns, int64_t at, int32_t plane) {
  const int64_t block = at / 64, left = columns - block * PLANE_COLUMNS;
  const int64_t bytes = left >= PLANE_COLUMNS ? 8 : (left + 31) / 32, skipped = at % 64 / 8;
  const uint8_t* from = row + low_bytes(columns) + block * 32 + plane * bytes + skipped;
  uint64_t bits = 0;
  if (bytes == 8 && skipped == 0) {
    __builtin_memcpy(&bits, from, 8);
  } else if (skipped < bytes) {
    __builtin_memcpy(&bits, from, static_cast<size_t>(bytes - skipped));
  }
  return bits;
}

}  // namespace
}  // namespace quern
