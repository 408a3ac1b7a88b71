#include "trellis/code.h"

#include <stdexcept>

namespace quern {

namespace {

constexpr int32_t LARGEST_ENTRY = 127;

void check(int32_t bits, int32_t window, int32_t tables, int32_t lag) {
  if (bits < 2 || bits > TRELLIS_MAX_BITS) throw std::invalid_argument("a trellis has 2, 3 or 4 bits a weight");
  if (window != 6 && window != 7) throw std::invalid_argument("a window of a trellis has 6 or 7 bits");
  if (tables != 1 && tables != 2) throw std::invalid_argument("a trellis has one or two tables");
  if (tables == 2 && (lag < 1 || window + bits * lag > TRELLIS_MAX_SPAN))
    throw std::invalid_argument("the windows of two tables must begin at least one step and at most 14 bits apart");
}

}  // namespace

TrellisCode::TrellisCode(int32_t bits, int32_t window, int32_t tables, int32_t lag, const int8_t* table) {
  check(bits, window, tables, lag);
  const int32_t entries = 1 << window, offset = tables == 2 ? bits * lag : 0;
  for (int32_t i = 0; i < tables * entries; ++i)
    if (table[i] < -LARGEST_ENTRY) throw std::invalid_argument("entries of a trellis table lie in -127 ... 127");
  bits_ = bits;
  span_ = window + offset;
  for (int32_t branch = 0; branch < 1 << span_; ++branch) {
    int32_t value = table[branch >> offset];
    if (tables == 2) value += table[entries + (branch & (entries - 1))];
    values_.push_back(static_cast<int16_t>(value));
    const uint32_t square = static_cast<uint32_t>(value * value - (1 << 15)) & 0xFFFF;
    pairs_.push_back(static_cast<int32_t>(square << 16 | (static_cast<uint32_t>(-value) & 0xFFFF)));
  }
}

int64_t TrellisCode::code_bytes(int32_t rows, int32_t columns) const {
  const int64_t blocks = (columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  const int64_t whole = rows / TILE_ROWS;
  return (whole * stream_bytes(TILE_ROWS) + stream_bytes(rows % TILE_ROWS)) * blocks * REGISTER_BYTES;
}

}  // namespace quern
