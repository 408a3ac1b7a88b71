// Rounding to the points of a trellis code: the best stream for the rows of one column, tile by tile.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "trellis/code.h"

namespace quern {

// Rounds the columns of some rows of a matrix, each once and in any order, and keeps their codes in the layout of
// kernels/weight.h. One thread at a time.
class TrellisEncoder {
 public:
  // `scales` has one finite number a row, not below zero; a row of scale zero stores zeros. `isa` names the instruction set.
  TrellisEncoder(TrellisCode code, std::vector<float> scales, int32_t columns, const std::string& isa);

  int32_t rows() const { return static_cast<int32_t>(scales_.size()); }
  int32_t columns() const { return columns_; }
  const std::vector<uint8_t>& codes() const { return codes_; }

  // `values` and `decoded` (what the codes stand for) have one number a row.
  void round(int32_t column, const float* values, float* decoded);
  // All columns of a matrix (rows, columns).
  void round_all(const float* weight, float* decoded);

 private:
  void round_tile(int32_t first_row, int32_t column, const float* values, float* decoded);
  void find_streams(int32_t steps, int32_t circle);
  void search_all(int32_t steps, int32_t circle);
  void rate_seams(int32_t steps, int32_t spare_bits, int32_t tied_bits);
  void follow(int32_t steps, int32_t tied_bits, const int32_t* seams, int32_t* lowest);
  int32_t* start(int32_t cost);

  TrellisCode code_;
  const TrellisKernels& kernels_;
  std::vector<float> scales_, inverses_;
  int32_t columns_;
  std::vector<uint8_t> codes_;
  // Of one column of one tile.
  int32_t inputs_[TRELLIS_LANES * TILE_LANE_ROWS];
  uint16_t path_[TRELLIS_LANES * TILE_LANE_ROWS];  // the branch of every step and lane
  int32_t before_[TRELLIS_LANES];                  // the state before the first step
  uint64_t streams_[TRELLIS_LANES];
  std::vector<int32_t> costs_, other_costs_, seam_costs_;  // (2^(span - bits), lanes)
  std::vector<uint8_t> history_;
};

}  // namespace quern
