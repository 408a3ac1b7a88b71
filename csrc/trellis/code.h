// A trellis code: what it stands for, and what its layout (kernels/weight.h) makes of a matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "trellis/kernels.h"

namespace quern {

constexpr int32_t TILE_ROWS = 256;
constexpr int32_t TILE_LANE_ROWS = 16;  // rows side by side in a tile; the next step is so many rows below
constexpr int32_t BLOCK_COLUMNS = 4;
constexpr int32_t REGISTER_BYTES = 64;

class TrellisCode {
 public:
  // `table` is (tables, 2^window), entries in [-127, 127]. Throws std::invalid_argument.
  TrellisCode(int32_t bits, int32_t window, int32_t tables, int32_t lag, const int8_t* table);

  int32_t bits() const { return bits_; }
  // Bits of the stream that a value depends on: both windows.
  int32_t span() const { return span_; }
  // What the `span` bits that end with a step stand for, the newest highest.
  int32_t value(int32_t branch) const { return values_[branch]; }
  TrellisBranches branches() const { return {bits_, span_, pairs_.data()}; }

  // Bytes of one lane's stream in a tile of `height` rows.
  int32_t stream_bytes(int32_t height) const { return (bits_ * steps(height) + 7) / 8; }
  static int32_t steps(int32_t height) { return (height + TILE_LANE_ROWS - 1) / TILE_LANE_ROWS; }
  int64_t code_bytes(int32_t rows, int32_t columns) const;

 private:
  int32_t bits_, span_;
  std::vector<int16_t> values_;
  std::vector<int32_t> pairs_;
};

}  // namespace quern
