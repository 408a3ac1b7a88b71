// The functions of `ColumnKernels`, written once and compiled for each instruction set. Rows do not know each other, so that
// a strip of them goes through a whole block while its numbers stay in the cache; every number is computed by the same
// additions and multiplications in the same order, whatever lies beside it.
// No include guard and no linkage: for columns_<instruction set>.cc alone.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "rounding/columns.h"

namespace quern {
namespace {

constexpr int64_t STRIP = 32;  // rows, in two registers of AVX-512

// Sixteen numbers, in as many registers as the instruction set needs.
typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;
constexpr int64_t PARTS = STRIP / LANES;

struct Strip {
  Lanes part[PARTS];
};

inline Strip load(const float* from) {
  Strip found;
  std::memcpy(&found, from, sizeof(found));
  return found;
}

inline void store(float* to, const Strip& strip) { std::memcpy(to, &strip, sizeof(strip)); }

// Numbers of a strip of some columns, the rows that there are not zero.
class Columns {
 public:
  Columns(int64_t count) : numbers_(count * STRIP, 0.0f) {}
  float* operator[](int64_t column) { return numbers_.data() + column * STRIP; }

  void read(const float* from, int64_t first, int64_t last, int64_t rows, int64_t row, int64_t height) {
    for (int64_t k = first; k < last; ++k) std::memcpy((*this)[k], from + k * rows + row, height * sizeof(float));
  }
  void write(float* to, int64_t first, int64_t last, int64_t rows, int64_t row, int64_t height) {
    for (int64_t k = first; k < last; ++k) std::memcpy(to + k * rows + row, (*this)[k], height * sizeof(float));
  }

 private:
  std::vector<float> numbers_;
};

// Codes of `values` and what they stand for.
inline void round_even_steps(float largest, const float* values, const float* scale, const float* zero, uint8_t* codes,
                             float* decoded) {
  for (int64_t r = 0; r < STRIP; ++r) {
    float code = std::rint(values[r] / scale[r]) + zero[r];
    code = code > 0.0f ? code : 0.0f;
    code = code < largest ? code : largest;
    codes[r] = static_cast<uint8_t>(static_cast<int32_t>(code));
    decoded[r] = (code - zero[r]) * scale[r];
  }
}

inline void round_to_numbers(const ColumnGrid& grid, const float* values, const float* scale, uint8_t* codes,
                             float* decoded) {
  float relative[STRIP];
  int32_t rank[STRIP];
  for (int64_t r = 0; r < STRIP; ++r) relative[r] = values[r] / scale[r];
  for (int64_t r = 0; r < STRIP; ++r) rank[r] = 0;
  for (int32_t i = 0; i + 1 < grid.count; ++i)
    for (int64_t r = 0; r < STRIP; ++r) rank[r] += relative[r] > grid.limits[i];
  for (int64_t r = 0; r < STRIP; ++r) {
    codes[r] = grid.codes[rank[r]];
    decoded[r] = grid.numbers[rank[r]] * scale[r];
  }
}

// Rounds one column of a strip, and keeps its codes.
class Rounder {
 public:
  Rounder(const ColumnGrid& grid, const ColumnRows& rows, int64_t row, int64_t height)
      : grid_(grid), rows_(rows), row_(row), height_(height), group_(-1) {}

  void round(int64_t column, const float* values, float* decoded) {
    choose(column / rows_.group);
    uint8_t codes[STRIP];
    if (grid_.limits)
      round_to_numbers(grid_, values, scale_, codes, decoded);
    else
      round_even_steps(static_cast<float>(grid_.count - 1), values, scale_, zero_, codes, decoded);
    std::memcpy(rows_.codes + column * rows_.rows + row_, codes, height_);
  }

 private:
  void choose(int64_t group) {
    if (group == group_) return;
    group_ = group;
    std::fill(scale_, scale_ + STRIP, 1.0f);
    std::fill(zero_, zero_ + STRIP, 0.0f);
    std::memcpy(scale_, rows_.scale + group * rows_.rows + row_, height_ * sizeof(float));
    std::memcpy(zero_, rows_.zero + group * rows_.rows + row_, height_ * sizeof(float));
  }

  const ColumnGrid& grid_;
  const ColumnRows& rows_;
  const int64_t row_, height_;
  int64_t group_;
  float scale_[STRIP], zero_[STRIP];
};

void feed_forward(const ColumnGrid& grid, const ColumnRows& rows, const ColumnBlock& block, const float* inside,
                  const float* original, float* target, float* done, float* rounded) {
  Columns targets(block.last), dones(block.last), originals(block.last), found(block.last);
  for (int64_t row = 0; row < rows.rows; row += STRIP) {
    const int64_t height = std::min(STRIP, rows.rows - row);
    dones.read(done, 0, block.first, rows.rows, row, height);
    targets.read(target, block.first, block.last, rows.rows, row, height);
    originals.read(original, block.first, block.last, rows.rows, row, height);
    Rounder rounder(grid, rows, row, height);
    for (int64_t k = block.first; k < block.last; ++k) {
      const float* weights = inside + k * block.size;
      Strip value = load(targets[k]);
      for (int64_t j = 0; j < k; ++j) {
        const Strip before = load(dones[j]);
        for (int64_t p = 0; p < PARTS; ++p) value.part[p] += weights[j] * before.part[p];
      }
      store(targets[k], value);
      rounder.round(block.places[k], targets[k], found[k]);
      const Strip stored = load(found[k]);
      Strip left = load(originals[k]);
      for (int64_t p = 0; p < PARTS; ++p) left.part[p] -= stored.part[p];
      for (int64_t p = 0; p < PARTS; ++p) value.part[p] -= stored.part[p];
      store(dones[k], left);
      store(targets[k], value);
    }
    targets.write(target, block.first, block.last, rows.rows, row, height);
    dones.write(done, block.first, block.last, rows.rows, row, height);
    found.write(rounded, block.first, block.last, rows.rows, row, height);
  }
}

void sweep(const ColumnGrid& grid, const ColumnRows& rows, const ColumnBlock& block, const float* hessian, float* rounded,
           float* residual) {
  Columns now(block.last), residuals(block.size);
  float wanted[STRIP], found[STRIP];
  for (int64_t row = 0; row < rows.rows; row += STRIP) {
    const int64_t height = std::min(STRIP, rows.rows - row);
    now.read(rounded, block.first, block.last, rows.rows, row, height);
    residuals.read(residual, 0, block.size, rows.rows, row, height);
    Rounder rounder(grid, rows, row, height);
    for (int64_t k = block.first; k < block.last; ++k) {
      const float* weights = hessian + k * block.size;
      for (int64_t r = 0; r < STRIP; ++r) wanted[r] = now[k][r] - residuals[k][r] / weights[k];
      rounder.round(block.places[k], wanted, found);
      bool moves = false;
      for (int64_t r = 0; r < height; ++r) moves |= found[r] != now[k][r];
      if (!moves) continue;
      const Strip before = load(now[k]);
      Strip move = load(found);
      store(now[k], move);
      for (int64_t p = 0; p < PARTS; ++p) move.part[p] -= before.part[p];
      for (int64_t j = 0; j < block.size; ++j) {
        Strip one = load(residuals[j]);
        for (int64_t p = 0; p < PARTS; ++p) one.part[p] += weights[j] * move.part[p];
        store(residuals[j], one);
      }
    }
    now.write(rounded, block.first, block.last, rows.rows, row, height);
    residuals.write(residual, 0, block.size, rows.rows, row, height);
  }
}

}  // namespace
}  // namespace quern

#define QUERN_TABLE {feed_forward, sweep}
